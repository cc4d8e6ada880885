"""The Python interface: load, train, compose, draw. The command line and the page's worker call the same."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.adapters.files import load_adapter, save_adapter
from studio.bases import base_to_draw, base_to_train, cached_base, execution
from studio.composition.engine import compose
from studio.errors import OutputError, UsageError
from studio.generation import Settings, Stopped, draw, quiet, solver
from studio.models.base import load_base
from studio.models.device import resolve_device
from studio.png import infotext, write_png
from studio.provenance import differences, facts_of
from studio.specs import AdapterUse, Event, GenerateSpec, OnEvent, TrainSpec, adapter_names, parse_spec
from studio.trainers import loop
from studio.trainers.outputs import part_paths, save_trained
from studio.trainers.processes import join
from studio.trainers.run_folder import RunFolder
from studio.workspace import workspace

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from studio.adapters.adapter import Adapter
    from studio.specs.execution import Attention, Offload, Quantization
    from studio.trainers.job import SampleFunction

__all__ = [
    "Result",
    "TrainResult",
    "compose",
    "generate",
    "generate_batch",
    "load_adapter",
    "load_base",
    "save_adapter",
    "train",
    "warm",
]


@dataclass(frozen=True)
class TrainResult:
    """What a training run left.

    Attributes:
        path: The adapter's file.
        adapter: The same in memory.
        losses: Loss of each optimizer step.
        seconds: Time of all, the loading of the base included.
        stopped: Whether it was asked to stop before its last step.
        parts: Files of the adapter's parts, by what the method calls them.
        main: Whether this process wrote the files; of several that train together the first one does, and it
            alone knows the losses.
    """

    path: Path
    adapter: "Adapter"
    losses: tuple[float, ...]
    seconds: float
    stopped: bool
    parts: Mapping[str, Path] = field(default_factory=dict)
    main: bool = True


@dataclass(frozen=True)
class Result:
    """One picture.

    Attributes:
        image: The picture.
        prompt: What it was asked to show.
        seed: Of its noise.
        infotext: Its settings in the form that other programs read.
        path: Its file, or None if it was not written.
    """

    image: "Image"
    prompt: str
    seed: int
    infotext: str
    path: Path | None = None


def train(
    spec: TrainSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> TrainResult:
    """Train an adapter and write its file; the base is bit for bit what it was before.

    Args:
        spec: The run.
        on_event: Told of the report before the start, progress, samples and files.
        stop: Asked between steps; a run that is stopped writes what it has.

    Raises:
        OutputError: If the output exists and may not be replaced, or cannot be written.
        DataError: If the pictures cannot be used.
        BaseModelError: If the base cannot be loaded.
        TrainingError: If the run cannot start or go on.
    """
    start = time.monotonic()
    processes = join(resolve_device(spec.device))
    with processes.together():
        parts = part_paths(spec.output, spec)
        for path in (spec.output, *parts.values()):
            _check_writable(path, overwrite=spec.may_replace)
        pipe = base_to_train(spec, processes)
    tell = on_event or _nobody
    losses: list[float] = []
    stops: list[bool] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and "loss" in event.values:
            losses.append(event.values["loss"])
        tell(event)

    def asked() -> bool:
        if stop is not None and stop():
            stops.append(True)
        return bool(stops)

    if spec.cache == "disk" and spec.cache_folder is None:
        spec = spec.model_copy(update={"cache_folder": workspace().encoded})
    with quiet(pipe):
        adapter = loop.train(pipe, spec, on_event=watch, stop=asked, sample=_sampler(spec))
    with processes.together():
        stopped = processes.any(bool(stops))
        seconds = time.monotonic() - start
        if processes.main:
            events = [
                Event(kind="saved", path=path, message=f"wrote {path}")
                for path in save_trained(adapter, spec.output, spec, base=pipe, overwrite=spec.may_replace)
            ]
            values = {"seconds": seconds} | ({"loss": losses[-1]} if losses else {})
            for event in (*events, Event(kind="finished", path=spec.output, values=values)):
                RunFolder(spec.output).record(event)
                tell(event)
    return TrainResult(spec.output, adapter, tuple(losses), seconds, stopped, parts, processes.main)


def generate(
    spec: GenerateSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> list[Result]:
    """Draw the pictures of a request and write each as ``<index>-<seed>.png`` with its settings inside.

    Args:
        spec: The request.
        on_event: Told of progress in denoising steps, of each written picture, and of a base or adapter whose
            hash is not the expected one.
        stop: Asked between denoising steps; the pictures finished by then are returned.

    Raises:
        OutputError: If a picture exists and may not be replaced, or cannot be written.
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
    """
    seeds = range(spec.seed, spec.seed + spec.count)
    singles = [spec.model_copy(update={"seed": seed, "count": 1}) for seed in seeds]
    paths = _picture_paths(singles)
    tell = on_event or _nobody
    results: list[Result] = []
    try:
        for result in _draw_all(singles, batch_size=spec.batch_size, paths=paths, tell=tell, stop=stop):
            results.append(result)
    except Stopped:
        tell(Event(kind="message", message=f"stopped after {len(results)} of {spec.count} pictures"))
    tell(Event(kind="finished", path=spec.output, values={"pictures": float(len(results))}))
    return results


def generate_batch(
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    base: str = "starter",
    adapters: Mapping[str | Path, float] | None = None,
    method: str = "merge",
    options: Mapping[str, Any] | None = None,
    modifiers: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 1,
    negative_prompt: str = "",
    steps: int = 25,
    guidance_scale: float = 5.0,
    width: int | None = None,
    height: int | None = None,
    scheduler: str = "default",
    precision: str = "auto",
    device: str = "auto",
    attention: "Attention" = "auto",
    quantize_base: "Quantization" = "none",
    offload: "Offload" = "none",
    vae_tiling: bool = False,
    compile: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Iterator[Result]:
    """Yield a picture of every prompt with every seed, prompt by prompt, as they come.

    The adapters stay on the base until the iterator is used up or closed.

    Args:
        prompts: What to draw.
        seeds: Each prompt is drawn with each of these.
        base: Base model.
        adapters: Weight by adapter file.
        method: How several adapters act together.
        options: Of the method.
        modifiers: What to change of the method's plan, in this order: options by plan modifier.
        batch_size: Pictures drawn at once; it does not change their noise.
        negative_prompt: What to steer away from.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 and less turn it off.
        width: Pixels; None for the base's own.
        height: Pixels; None for the base's own.
        scheduler: Solver.
        precision: Number type.
        device: Where to draw.
        attention: How attention is computed.
        quantize_base: What the UNet's transformer blocks are held in.
        offload: What waits on the CPU.
        vae_tiling: Decode tile by tile.
        compile: Compile the UNet's transformer blocks.
        output: Folder to write each picture to, as `generate` does; None writes nothing.
        overwrite: Replace pictures of the same name.
        on_event: Told of progress in denoising steps and of each written picture.

    Raises:
        UsageError: If a value is out of range.
        OutputError: If a picture exists and may not be replaced, or cannot be written.
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts must be a list of texts, got one text. Put it in a list.")
    shared = {
        "base": base,
        "adapters": [AdapterUse(path=Path(path), weight=weight) for path, weight in (adapters or {}).items()],
        "method": method,
        "options": options or {},
        "modifiers": modifiers or {},
        "batch_size": batch_size,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "scheduler": scheduler,
        "precision": precision,
        "device": device,
        "attention": attention,
        "quantize_base": quantize_base,
        "offload": offload,
        "vae_tiling": vae_tiling,
        "compile": compile,
        "overwrite": overwrite,
        **({} if output is None else {"output": output}),
    }
    specs = [
        parse_spec(GenerateSpec, {**shared, "prompt": text, "seed": seed})
        for text in prompts
        for seed in seeds
    ]
    paths = () if output is None else _picture_paths(specs)
    return _draw_all(specs, batch_size=batch_size, paths=paths, tell=on_event or _nobody)


def _picture_paths(specs: Sequence[GenerateSpec]) -> list[Path]:
    """Return each picture's file, ``<index>-<seed>.png``, after checking that all may be written."""
    paths = [spec.output / f"{index:04d}-{spec.seed}.png" for index, spec in enumerate(specs)]
    for path, spec in zip(paths, specs, strict=True):
        _check_writable(path, overwrite=spec.overwrite)
    return paths


def _draw_all(
    specs: Sequence[GenerateSpec],
    *,
    batch_size: int,
    paths: Sequence[Path],
    tell: OnEvent,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Result]:
    """Yield each specification's picture, written if there are paths; only prompt and seed may differ."""
    if not specs:
        return
    first = specs[0]
    settings = Settings(first.negative_prompt, first.steps, first.guidance_scale, first.width, first.height)
    total = first.steps * len(specs)
    with ExitStack() as stack:
        pipe = base_to_draw(first)
        stack.enter_context(quiet(pipe))
        sampler = stack.enter_context(solver(pipe, first.scheduler))
        # Before composing: inside, the fingerprint would be that of the composed weights.
        facts = facts_of(pipe, first, sampler=sampler)
        for line in differences(first, facts):
            tell(Event(kind="message", message=line))
        stack.enter_context(execution(pipe, first))
        stack.enter_context(_composed(pipe, first))
        for start in range(0, len(specs), batch_size):
            batch = specs[start : start + batch_size]

            def report(done: int, start: int = start, size: int = len(batch)) -> None:
                tell(Event(kind="progress", step=first.steps * start + done * size, total=total))

            images = draw(
                pipe,
                [spec.prompt for spec in batch],
                [spec.seed for spec in batch],
                settings=settings,
                on_step=report,
                stop=stop,
            )
            for index, (spec, image) in enumerate(zip(batch, images, strict=True), start):
                known = replace(facts, width=image.width, height=image.height)
                path = paths[index] if paths else None
                text = write_png(image, path, spec, known) if path else infotext(spec, known)
                if path:
                    tell(Event(kind="picture", path=path, step=index + 1, total=len(specs)))
                yield Result(image, spec.prompt, spec.seed, text, path)


def _composed(pipe: "DiffusionPipeline", spec: GenerateSpec) -> AbstractContextManager[Any]:
    if not spec.adapters and not spec.modifiers:
        return ExitStack()
    names = adapter_names(spec.adapters)
    adapters = {
        name: load_adapter(use.path, base=pipe, name=name)
        for name, use in zip(names, spec.adapters, strict=True)
    }
    weights = {name: use.weight for name, use in zip(names, spec.adapters, strict=True)}
    return compose(
        pipe,
        adapters,
        method=spec.method,
        weights=weights,
        options=spec.options,
        modifiers=spec.modifiers,
    )


def _sampler(spec: TrainSpec) -> "SampleFunction":
    """Return what draws a training run's samples and class pictures: the same way as `generate` draws."""
    settings = Settings(steps=spec.sample_steps, width=spec.resolution, height=spec.resolution)

    def sample(
        pipe: "DiffusionPipeline", adapter: "Adapter | None", prompts: Sequence[str], seeds: Sequence[int]
    ) -> "list[Image]":
        with ExitStack() as stack:
            stack.enter_context(solver(pipe, "default"))
            if adapter is not None:
                stack.enter_context(compose(pipe, {"adapter": adapter}))
            return draw(pipe, prompts, seeds, settings=settings)

    return sample


def warm(base: str, *, device: str = "auto", precision: str = "auto") -> None:
    """Load a base model ahead of the first `train` or `generate` that uses it.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    cached_base(base, device, precision)


def _check_writable(path: Path, *, overwrite: bool) -> None:
    """Make the folder of an output and refuse before the work what would fail after it."""
    if path.is_dir():
        raise OutputError(f"'{path}' is a folder where a file is to be written. Choose another output.")
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' exists. Choose another output or give --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder '{path.parent}': {error.strerror or error}.") from None
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder '{path.parent}' may not be written to. Choose another output.")


def _nobody(_: Event) -> None:
    """Take an event that nobody asked for."""
