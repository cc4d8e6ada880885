"""The Python interface: load, train, compose, draw. The command line and the page's worker call the same."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.metadata import now
from studio.bases import base_to_train, cached_base
from studio.batches.drawing import draw_wanted, missing
from studio.batches.lines import Line, Wanted, wanted_pictures
from studio.batches.manifest import Manifest
from studio.batches.run import draw_batch, draw_grid, written
from studio.composition.engine import compose
from studio.drawing import Result, check_writable, draw_all, picture_paths
from studio.errors import OutputError, SpecError, UsageError
from studio.generation import Stopped, quiet
from studio.models.base import load_base
from studio.models.device import release_memory, resolve_device
from studio.prompt_settings import settled
from studio.samples import draw_samples
from studio.specs import AdapterUse, Event, GenerateSpec, OnEvent, TrainSpec
from studio.specs.events import silent
from studio.trainers import loop
from studio.trainers.outputs import part_paths, save_trained
from studio.trainers.processes import join
from studio.trainers.run_folder import RunFolder
from studio.trainers.shortage import shortage_told
from studio.workspace import workspace

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from studio.adapters.adapter import Adapter
    from studio.specs.execution import Attention, Offload, Quantization

__all__ = [
    "Result",
    "TrainResult",
    "compose",
    "draw_batch",
    "draw_grid",
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
        MemoryShortage: If the memory is not enough; says what takes less, and which checkpoint is kept.
    """
    start, started = time.monotonic(), now()
    device = resolve_device(spec.device)
    processes = join(device)
    with processes.together(), shortage_told(spec, device):
        parts = part_paths(spec.output, spec)
        for path in (spec.output, *parts.values()):
            check_writable(path, overwrite=spec.may_replace)
        tell = on_event or silent
        pipe = base_to_train(spec, processes, tell)
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
        adapter = loop.train(pipe, spec, on_event=watch, stop=asked, sample=draw_samples)
    release_memory()
    with processes.together():
        stopped = processes.any(bool(stops))
        seconds = time.monotonic() - start
        if processes.main:
            files = _saved(adapter, spec, pipe, started=started)
            events = [
                Event(kind="saved", path=path, part=part, message=f"wrote {path}")
                for part, path in files.items()
            ]
            values = {"seconds": seconds} | ({"loss": losses[-1]} if losses else {})
            for event in (*events, Event(kind="finished", path=spec.output, values=values)):
                RunFolder(spec.output).record(event)
                tell(event)
    return TrainResult(spec.output, adapter, tuple(losses), seconds, stopped, parts, processes.main)


def _saved(
    adapter: "Adapter", spec: TrainSpec, pipe: "DiffusionPipeline", *, started: float
) -> dict[str, Path]:
    """Write a trained adapter; where that fails now, after all the work, into the run's folder.

    Raises:
        OutputError: If it cannot be written to the output; names the file that it is in instead.
    """
    try:
        return save_trained(
            adapter, spec.output, spec, base=pipe, started=started, overwrite=spec.may_replace
        )
    except OutputError as error:
        path = RunFolder(spec.output).adapters / spec.output.name
        try:
            save_trained(adapter, path, spec, base=pipe, started=started, overwrite=True)
        except OutputError:
            raise error from None
        raise OutputError(f"{error} The adapter is kept as {path}.") from None


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
    spec = settled(spec)
    seeds = range(spec.seed, spec.seed + spec.count)
    singles = [spec.model_copy(update={"seed": seed, "count": 1}) for seed in seeds]
    paths = picture_paths(singles)
    tell = on_event or silent
    results: list[Result] = []
    try:
        for _, result in draw_all(singles, batch_size=spec.batch_size, paths=paths, tell=tell, stop=stop):
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
    clip_skip: int = 1,
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
    """Yield a picture of every prompt with every seed as they come: prompt by prompt, but long prompts last.

    The adapters stay on the base until the iterator is used up or closed. What a prompt says of itself, such
    as ``<lora:name:0.8>`` and ``--s 30``, counts for it alone; see docs/generating.md.

    Args:
        prompts: What to draw.
        seeds: Each prompt is drawn with each of these, unless it ends in ``--d`` with its own.
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
        clip_skip: Layer of the text encoder whose output is used, counted from the end.
        precision: Number type.
        device: Where to draw.
        attention: How attention is computed.
        quantize_base: What the UNet's transformer blocks are held in.
        offload: What waits on the CPU.
        vae_tiling: Decode tile by tile.
        compile: Compile the UNet's transformer blocks.
        output: Folder to write each picture to as ``<number of the prompt>-<seed>.png``, listed in
            ``manifest.jsonl``; None writes nothing. Those that are there already are neither drawn nor
            yielded.
        overwrite: Draw pictures anew that are there with other settings.
        on_event: Told of progress in denoising steps and of each written picture.

    Raises:
        UsageError: If a value is out of range.
        OutputError: If a picture is there with other settings, or cannot be written.
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
        "clip_skip": clip_skip,
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
    lines = [Line(number, text) for number, text in enumerate(prompts, 1)]
    wanted, problems = wanted_pictures(lines, shared, seeds)
    if problems:
        raise SpecError(problems)
    if output is None:
        found = draw_wanted(wanted, batch_size=batch_size, write=False, tell=on_event or silent)
        return (result for _, result in found)
    todo = missing(wanted, overwrite=overwrite)
    return _listed(todo, Manifest(Path(output)), batch_size=batch_size, tell=on_event or silent)


def _listed(
    todo: Sequence[Wanted], manifest: Manifest, *, batch_size: int, tell: OnEvent
) -> Iterator[Result]:
    try:
        yield from written(todo, manifest, batch_size=batch_size, tell=tell)
    finally:
        manifest.settle()


def warm(base: str, *, device: str = "auto", precision: str = "auto") -> None:
    """Load a base model ahead of the first `train` or `generate` that uses it.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    cached_base(base, device, precision)
