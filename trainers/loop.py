"""The training loop that all methods share."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.formats.embedding import Embedding
from studio.adapters.parameters import canonical_names, components_of
from studio.data.captions import full_caption, with_trigger
from studio.data.dataset import read_dataset
from studio.data.picture import PictureSet, Treatment
from studio.data.report import report
from studio.errors import TrainingError
from studio.models.architecture import architecture
from studio.registry import FORMATS, TRAINERS
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.base import Trainer
from studio.trainers.borrow import borrowed, converted
from studio.trainers.checkpoint import Checkpoints, State
from studio.trainers.class_pictures import draw_class_pictures
from studio.trainers.identity import Identity, check_same, identity
from studio.trainers.inputs import make_batches, make_buckets, make_validation
from studio.trainers.job import Job, SampleFunction
from studio.trainers.metadata import base_facts, run_facts
from studio.trainers.outputs import layers_of, size_note
from studio.trainers.run import Run
from studio.trainers.run_folder import RunFolder
from studio.trainers.runtime import (
    choose_device,
    choose_precision,
    make_accelerator,
    own_random_state,
    weight_dtype,
)
from studio.trainers.validation import check_validation


def train(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    *,
    on_event: OnEvent = lambda event: None,
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
    """
    data = read_dataset(spec)
    pictures, class_pictures = data.pictures, data.class_pictures
    captions = [full_caption(picture) for picture in data.all_pictures]
    resolution = check_request(pipe, spec, [*captions, *spec.class_prompts], can_sample=sample is not None)
    check_validation(spec, data.validation)
    buckets = make_buckets(pipe, spec, resolution)
    device = choose_device(spec, pipe)
    precision = choose_precision(spec, pipe, device)
    method: type[Trainer] = TRAINERS[spec.method]
    remarks = method.remarks(spec, family=architecture(pipe), pictures=len(pictures.pictures))
    lines = [
        report(data, spec, buckets=buckets),
        *(f"Warning: {remark}" for remark in remarks),
        f"Method: {spec.method} in {precision} on {device}, learning rate {spec.unet_learning_rate:g}",
    ]
    facts = base_facts(pipe)
    own = identity(
        spec,
        base=facts["studio.base"],
        precision=precision,
        data={"data": pictures, "class_data": class_pictures, "validation": data.validation},
    )
    saved = _saved_state(spec, own, on_event) if spec.resume else None
    on_event = _recorded(RunFolder(spec.output), on_event)
    on_event(Event(kind="report", message="\n".join(lines), total=spec.steps))
    job = Job(
        pipe=pipe,
        spec=spec,
        facts=facts
        | run_facts(spec, pictures=pictures.epoch_size, resolution=resolution, precision=precision),
        identity=own,
        num_pictures=pictures.epoch_size,
        sample_prompt=with_trigger(spec.prompt or pictures.pictures[0].caption, Treatment.of(spec)),
        on_event=on_event,
        sample=sample,
    )
    trainer = method()
    with own_random_state(device), borrowed(pipe, device=device, dtype=weight_dtype(pipe, device, precision)):
        try:
            if spec.has_class_pictures and class_pictures is None:
                assert sample is not None
                class_pictures = _drawn_class_pictures(job, sample, resolution, stop)
            groups = trainer.prepare(pipe, spec)
            exported = layers_of(trainer.export())
            _check_format(exported, pipe, spec)
            if note := size_note(exported):
                job.tell(note)
            del exported
            batches = make_batches(
                pipe, spec, pictures, class_pictures, buckets=buckets, device=device, tell=job.tell
            )
            job.folder.begin(spec)
            accelerator = make_accelerator(
                device,
                precision,
                gradient_accumulation=spec.gradient_accumulation,
                tracker=spec.tracker,
                folder=job.folder.tracker,
            )
            held_out = (
                make_validation(pipe, spec, data.validation, buckets=buckets, device=device)
                if data.validation
                else None
            )
            return Run(job, trainer, groups, batches, accelerator, saved, held_out).go(stop)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU's memory is not enough: {str(error).splitlines()[0]} "
                "Lower batch_size or resolution, or turn gradient_checkpointing on."
            ) from None
        finally:
            trainer.release()


def _saved_state(spec: TrainSpec, own: Identity, on_event: OnEvent) -> State:
    """Return the state to go on from, of a run that is the same as this one."""

    def tell(message: str) -> None:
        on_event(Event(kind="message", message=message, total=spec.steps))

    checkpoints = Checkpoints(RunFolder(spec.output).checkpoints, keep=spec.keep_checkpoints)
    step, state = checkpoints.newest(tell)
    check_same(state["identity"], own, step=step)
    if state["identity"]["steps"] != spec.steps and spec.schedule != "constant":
        tell(
            f"Warning: the run was to have {state['identity']['steps']} steps, now {spec.steps}; its "
            "learning rate follows the new number from here on."
        )
    return state


def _recorded(folder: RunFolder, on_event: OnEvent) -> OnEvent:
    """Return what logs events in a run's folder and tells of them."""

    def tell(event: Event) -> None:
        folder.record(event)
        on_event(event)

    return tell


def _check_format(adapter: Adapter, pipe: DiffusionPipeline, spec: TrainSpec) -> None:
    """Try the file format on one change before the work rather than on all after it."""
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


def _drawn_class_pictures(
    job: Job, sample: SampleFunction, resolution: int, stop: Callable[[], bool]
) -> PictureSet:
    pipe = job.pipe

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        # Pipelines expect the autoencoder in the UNet's number type.
        with converted(pipe.vae, pipe.unet.dtype):
            return sample(pipe, None, prompts, seeds)

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
        UsageError: If a caption is too long for the text encoders.
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
