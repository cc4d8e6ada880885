"""The training loop that all methods share."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter
from studio.adapters.formats.embedding import Embedding
from studio.adapters.live import LiveLayers
from studio.adapters.parameters import canonical_names, components_of
from studio.data.buckets import Buckets
from studio.data.captions import full_caption, with_trigger
from studio.data.dataset import DataSet, read_dataset
from studio.data.picture import PictureSet, Treatment
from studio.data.report import report
from studio.errors import TrainingError
from studio.models.architecture import architecture
from studio.registry import FORMATS, TRAINERS
from studio.specs.events import Event, OnEvent, silent
from studio.specs.train import TrainSpec
from studio.trainers.base import Trainer
from studio.trainers.borrow import borrowed, converted
from studio.trainers.checkpoint import Checkpoints, State
from studio.trainers.class_pictures import draw_class_pictures
from studio.trainers.identity import Identity, check_alike, check_same, identity, in_step
from studio.trainers.inputs import (
    caption_note,
    check_timesteps,
    make_batches,
    make_buckets,
    make_validation,
)
from studio.trainers.job import Job, SampleFunction
from studio.trainers.metadata import base_facts, run_facts
from studio.trainers.optimizers import optimizer_of
from studio.trainers.outputs import layers_of, size_note
from studio.trainers.processes import Processes, join
from studio.trainers.run import Run
from studio.trainers.run_folder import RunFolder
from studio.trainers.runtime import (
    Precision,
    check_execution,
    choose_device,
    choose_precision,
    execution,
    make_accelerator,
    own_random_state,
    weight_dtype,
)
from studio.trainers.samples import drawn_raw, sample_specs
from studio.trainers.shortage import shortage_told
from studio.trainers.validation import check_validation
from studio.trainers.without_effect import without_effect


def train(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    *,
    on_event: OnEvent = silent,
    stop: Callable[[], bool] = lambda: False,
    sample: SampleFunction | None = None,
) -> Adapter:
    """Fit an adapter and return it; the base is given back bit for bit, also after an exception.

    Args:
        pipe: The base, in any number type and on any device.
        spec: What to do. ``spec.output`` itself is not written; all else lies in the run's folder beside it.
        on_event: Told ``report``, then ``progress`` (values ``loss``, ``loss_smoothed``, ``learning_rate``,
            ``steps_per_second`` and, if trained, ``text_encoder_learning_rate``), ``sample``, ``saved`` and
            ``message``.
        stop: Asked before each step; when true a checkpoint is written and the adapter returned as it is, its
            metadata with the steps done.
        sample: Draws the sample pictures and the class pictures.

    Raises:
        DataError: If the pictures cannot be used.
        OutputError: If the run's folder cannot be written, or holds an earlier run.
        TrainingError: If training cannot start or go on, or diverges: the last good adapter is saved and
            named.
        MemoryShortage: If the memory is not enough; says what takes less, and which checkpoint is kept.
    """
    device = choose_device(spec, pipe)
    processes = join(device)
    with processes.together(), shortage_told(spec, device):
        material = _material(
            pipe, spec, processes.own(device, asked=spec.device), can_sample=sample is not None
        )
        job, saved = _begun(pipe, spec, material, processes, on_event if processes.main else silent, sample)
        dtype = weight_dtype(pipe, material.device, material.precision)
        with (
            own_random_state(material.device),
            execution(pipe, spec),
            borrowed(pipe, device=material.device, dtype=dtype),
        ):
            return _fit(job, material, saved, stop)


@dataclass(frozen=True)
class _Material:
    """What a run reads, where it computes and how.

    Attributes:
        data: The pictures.
        buckets: Sizes that they are brought to.
        resolution: Side of the training pictures in pixels.
        device: Where this process computes.
        precision: Number type of the forward pass.
        start: Adapter to start from, or None.
    """

    data: DataSet
    buckets: Buckets
    resolution: int
    device: torch.device
    precision: Precision
    start: Adapter | None


def _material(
    pipe: DiffusionPipeline, spec: TrainSpec, device: torch.device, *, can_sample: bool
) -> _Material:
    """Read the data and check all that can be checked before any work."""
    data = read_dataset(spec)
    captions = [full_caption(picture) for picture in data.all_pictures]
    resolution = check_request(pipe, spec, [*captions, *spec.class_prompts], can_sample=can_sample)
    check_validation(spec, data.validation)
    check_execution(pipe, spec, device)
    return _Material(
        data,
        make_buckets(pipe, spec, resolution),
        resolution,
        device,
        choose_precision(spec, pipe, device),
        load_adapter(spec.start_from, base=pipe) if spec.start_from else None,
    )


def _begun(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    material: _Material,
    processes: Processes,
    on_event: OnEvent,
    sample: SampleFunction | None,
) -> tuple[Job, State | None]:
    """Return the run, and the state that it goes on from; tell what it is about to do."""
    data, precision = material.data, material.precision
    facts = base_facts(pipe)
    own = identity(
        spec.model_copy(update={"resolution": material.resolution}),
        base=facts["studio.base"],
        precision=precision,
        data={"data": data.pictures, "class_data": data.class_pictures, "validation": data.validation},
        processes=processes.count,
    )
    check_alike(processes.main_says(in_step(spec, own)), in_step(spec, own), process=processes.index)
    saved = processes.main_first(lambda: _saved_state(spec, own, on_event)) if spec.resume else None
    _check_same_start(processes, saved)
    if saved is None:
        spec = spec.model_copy(update={"resume": False})
    if processes.main:
        on_event = _recorded(RunFolder(spec.output), on_event)
    epoch_size = data.pictures.epoch_size
    job = Job(
        pipe=pipe,
        spec=spec,
        facts=facts
        | run_facts(
            pipe,
            spec,
            data,
            buckets=material.buckets,
            resolution=material.resolution,
            precision=precision,
            processes=processes.count,
        ),
        identity=own,
        num_pictures=epoch_size,
        samples=sample_specs(
            spec, with_trigger(spec.prompt or data.pictures.pictures[0].caption, Treatment.of(spec))
        ),
        on_event=on_event,
        sample=sample,
        processes=processes,
    )
    on_event(Event(kind="report", message=_report(job, material), total=spec.steps))
    return job, saved


def _report(job: Job, material: _Material) -> str:
    spec, data = job.spec, material.data
    remarks = TRAINERS[spec.method].remarks(
        spec, family=architecture(job.pipe), pictures=len(data.pictures.pictures)
    )
    lines = [
        report(data, spec, buckets=material.buckets, processes=job.processes.count),
        *(f"Warning: {remark}" for remark in (*remarks, *sorted(without_effect(spec)))),
        f"Method: {spec.method} in {material.precision} on {material.device}, learning rate "
        f"{spec.unet_learning_rate:g}",
    ]
    return "\n".join(lines)


def _fit(job: Job, material: _Material, saved: State | None, stop: Callable[[], bool]) -> Adapter:
    """Attach the method to the base, run the loop, and detach it."""
    pipe, spec, device, data = job.pipe, job.spec, material.device, material.data
    trainer: Trainer = TRAINERS[spec.method]()
    with ExitStack() as stack:
        stack.callback(trainer.release)
        class_pictures = data.class_pictures
        if spec.has_class_pictures and class_pictures is None:
            class_pictures = job.processes.main_first(
                lambda: _drawn_class_pictures(job, material.resolution, stop)
            )
        groups = trainer.prepare(pipe, spec)
        if material.start is not None and saved is None:
            trainer.start_from(material.start)
        _check_adapter(trainer, job)
        if note := caption_note(pipe, data.all_pictures, max_tokens=spec.max_token_length):
            job.tell(note)
        # For its refusals only, before anything of an earlier run is replaced.
        optimizer_of(trainer, groups, spec)
        batches = make_batches(
            pipe,
            spec,
            data.pictures,
            class_pictures,
            buckets=material.buckets,
            device=device,
            processes=job.processes.count,
            tell=job.tell,
        )
        if job.processes.main:
            stack.enter_context(job.folder.held())
            job.folder.begin(spec)
        accelerator = make_accelerator(
            device,
            material.precision,
            gradient_accumulation=spec.gradient_accumulation,
            tracker=spec.tracker,
            folder=job.folder.tracker,
        )
        held_out = (
            make_validation(pipe, spec, data.validation, buckets=material.buckets, device=device)
            if data.validation
            else None
        )
        return Run(job, trainer, groups, batches, accelerator, saved, held_out).go(stop)


def _saved_state(spec: TrainSpec, own: Identity, on_event: OnEvent) -> State | None:
    """Return the state to go on from, of a run that is the same as this one, or None to start anew."""

    def tell(message: str) -> None:
        on_event(Event(kind="message", message=message, total=spec.steps))

    checkpoints = Checkpoints(RunFolder(spec.output).checkpoints, keep=spec.keep_checkpoints)
    if spec.overwrite and not checkpoints.steps():
        tell("There is no checkpoint to go on from: the run starts anew.")
        return None
    step, state = checkpoints.newest(tell)
    check_same(state["identity"], own, step=step)
    if state["identity"]["steps"] != spec.steps and spec.schedule != "constant":
        tell(
            f"Warning: the run was to have {state['identity']['steps']} steps, now {spec.steps}; its "
            "learning rate follows the new number from here on."
        )
    before, now = state["identity"]["division"], own["division"]
    if before != now:
        changed = ", ".join(
            f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]
        )
        tell(
            f"Warning: {changed}. Steps have the same samples, but sums are rounded in another order and "
            "dropout differs from here on."
        )
    return state


def _check_same_start(processes: Processes, saved: State | None) -> None:
    begun = 0 if saved is None else saved["done"]
    if (first := processes.main_says(begun)) != begun:
        raise TrainingError(
            f"process {processes.index} finds a checkpoint after step {begun}, process 0 one after step "
            f"{first}. Put the output where all machines see the same files."
        )


def _recorded(folder: RunFolder, on_event: OnEvent) -> OnEvent:
    """Return what logs events in a run's folder, from when there is one, and tells of them."""
    # A run that fails before it leaves anything leaves no folder either.
    unwritten: list[Event] = []

    def tell(event: Event) -> None:
        unwritten.append(event)
        if folder.path.is_dir():
            for each in unwritten:
                folder.record(each)
            unwritten.clear()
        on_event(event)

    return tell


def _check_adapter(trainer: Trainer, job: Job) -> None:
    """Say how large the file becomes, and try its format before the work rather than after it."""
    exported = layers_of(trainer.export())
    _check_format(exported, job.pipe, job.spec)
    if job.spec.quantize_base != "none" and job.spec.sample_every:
        _check_live(exported)
    if note := size_note(exported):
        job.tell(note)


def _check_live(adapter: Adapter) -> None:
    """Check that samples can be drawn where nothing can be merged into the weights."""
    changes = {name: [(change, 1.0)] for name, change in adapter.changes.items() if name.startswith("unet.")}
    if why := LiveLayers.why_not(changes):
        raise TrainingError(
            f"sample_every: no samples can be drawn on a quantised base with this method: {why}. Set "
            "sample_every to 0."
        )


def _check_format(adapter: Adapter, pipe: DiffusionPipeline, spec: TrainSpec) -> None:
    first = dict(itertools.islice(adapter.changes.items(), 1))
    names = canonical_names(components_of(pipe))
    form = FORMATS[spec.file_format]
    try:
        if not first and not isinstance(form, Embedding):
            raise ValueError("it is a token, which only a file of its own holds")
        form.write(replace(adapter, changes=first), family=None, names=names)
    except ValueError as error:
        raise TrainingError(
            f"'{spec.method}' adapters cannot be written in the format '{spec.file_format}': {error}. "
            f"Choose another format; the method's own is '{TRAINERS[spec.method].format}'."
        ) from None


def _drawn_class_pictures(job: Job, resolution: int, stop: Callable[[], bool]) -> PictureSet:
    pipe, sample = job.pipe, job.sample
    assert sample is not None

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        specs = [drawn_raw(job.spec, *wanted) for wanted in zip(prompts, seeds, strict=True)]
        # Pipelines expect the autoencoder in the UNet's number type.
        with converted(pipe.vae, pipe.unet.dtype):
            return sample(pipe, None, specs, ())

    return draw_class_pictures(
        job.spec,
        draw,
        base=job.facts["studio.base"],
        resolution=resolution,
        on_event=job.on_event,
        stop=stop,
    )


def check_request(
    pipe: DiffusionPipeline, spec: TrainSpec, captions: Sequence[str], *, can_sample: bool
) -> int:
    """Check what can be checked before any work and return the side of the training pictures in pixels.

    Raises:
        TrainingError: If base and specification do not fit together.
        OutputError: If the run's folder holds an earlier run.
        UsageError: If a new token exists already.
    """
    channels, wanted = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != wanted:
        raise TrainingError(
            f"the UNet takes {channels} channels, its autoencoder gives {wanted}; inpainting bases cannot be "
            "trained. Choose another base."
        )
    factor: int = pipe.vae_scale_factor
    resolution: int = spec.resolution or pipe.unet.config.sample_size * factor
    if resolution % factor:
        raise TrainingError(f"resolution must be a multiple of {factor} for this base, got {resolution}.")
    check_timesteps(pipe, spec)
    TRAINERS[spec.method].check_captions(pipe, spec, captions)
    if spec.sample_every and not can_sample:
        raise TrainingError(
            "sample_every is set but there is nothing to draw samples with. Pass sample=, or set it to 0."
        )
    if spec.class_prompts and spec.class_data is None and not can_sample:
        raise TrainingError(
            "class_prompts are given but there is nothing to draw class pictures with. Pass sample=, or give "
            "a folder of class pictures (class_data)."
        )
    RunFolder(spec.output).check(spec)
    return resolution
