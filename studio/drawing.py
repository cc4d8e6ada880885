"""Draw the pictures of specifications, compose what they ask for, and write each with its settings inside."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from studio.bases import base_to_draw, execution
from studio.composing.planning import load_adapters, weights_of
from studio.composition.cost import Cost, PictureCost
from studio.composition.engine import Composition, compose
from studio.errors import (
    AdapterError,
    CompositionError,
    OutputError,
    StudioError,
    UsageError,
    memory_told,
)
from studio.generation import Settings, batches, draw, num_chunks, quiet, solver
from studio.models.prompt_encoding import reading_prompts
from studio.png import infotext, write_png
from studio.provenance import differences, facts_of
from studio.specs import Event, GenerateSpec, OnEvent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


_LESS_MEMORY = (
    "Less is taken with a lower batch_size, width or height, with vae_tiling, offload, or quantize_base; see "
    "docs/memory.md."
)
_OF_PICTURES = (AdapterError, CompositionError, UsageError)


@dataclass(frozen=True)
class Result:
    """One picture.

    Attributes:
        image: The picture.
        prompt: What it was asked to show.
        seed: Of its noise.
        infotext: Its settings in the form that other programs read.
        path: Its file, or None if it was not written.
        cost: What the denoiser computed for it, where that is not what the base alone computes; else None.
    """

    image: "Image"
    prompt: str
    seed: int
    infotext: str
    path: Path | None = None
    cost: Cost | None = None


def picture_paths(specs: Sequence[GenerateSpec]) -> list[Path]:
    """Return each picture's file, ``<index>-<seed>.png``, after checking that all may be written."""
    paths = [spec.output / f"{index:04d}-{spec.seed}.png" for index, spec in enumerate(specs)]
    for path, spec in zip(paths, specs, strict=True):
        check_writable(path, overwrite=spec.overwrite)
    return paths


def draw_all(
    specs: Sequence[GenerateSpec],
    *,
    batch_size: int,
    paths: Sequence[Path],
    tell: OnEvent,
    stop: Callable[[], bool] | None = None,
    failed: Callable[[Sequence[int], StudioError], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield each specification's place and picture, written if there are paths.

    Args:
        specs: Settled, see ``prompt_settings``; only prompt and seed may differ.
        batch_size: The most pictures to draw at once. Prompts of more chunks come after shorter ones, never
            in one batch with them: what is filled up to the length of another looks different.
        paths: One for each, or none.
        tell: Told of denoising steps and of each written picture.
        stop: Asked between denoising steps.
        failed: Told of the places of what its adapters, composition or prompts do not let be drawn, and why;
            the others are drawn unless it raises. By default that is raised.

    Raises:
        MemoryShortage: If the memory is not enough.
        Stopped: If told to.
    """
    if not specs:
        return
    first = specs[0]
    settings = Settings.of(first)
    total = first.steps * len(specs)
    with ExitStack() as stack:
        stack.enter_context(memory_told(lambda: _LESS_MEMORY))
        pipe = base_to_draw(first, tell)
        stack.enter_context(quiet(pipe))
        sampler = stack.enter_context(solver(pipe, first.scheduler))
        try:
            # Before composing: inside, the fingerprint would be that of the composed weights.
            facts = facts_of(pipe, first, sampler=sampler)
            for line in differences(first, facts):
                tell(Event(kind="message", message=line))
            stack.enter_context(execution(pipe, first))
            # Around composing, which encodes further prompts the same way.
            reader = stack.enter_context(reading_prompts(pipe, raw=first.raw_prompt))
            costs = PictureCost(pipe, stack.enter_context(composed(pipe, first)))
            lengths = [num_chunks(reader, spec.prompt, settings) for spec in specs]
        except _OF_PICTURES as error:
            if failed is None:
                raise
            failed(range(len(specs)), error)
            return
        done = 0
        for places in batches(lengths, batch_size):

            def report(step: int, done: int = done, size: int = len(places)) -> None:
                tell(Event(kind="progress", step=first.steps * done + step * size, total=total))

            try:
                images = draw(
                    pipe,
                    [specs[place].prompt for place in places],
                    [specs[place].seed for place in places],
                    settings=settings,
                    on_step=report,
                    stop=stop,
                )
            except _OF_PICTURES as error:
                if failed is None:
                    raise
                failed(places, error)
                costs.leave_out()
                continue
            cost = costs.take(len(images), height=images[0].height, width=images[0].width)
            for place, image in zip(places, images, strict=True):
                spec, path = specs[place], paths[place] if paths else None
                known = replace(facts, width=image.width, height=image.height)
                if cost:
                    known = replace(known, macs=cost.total, cached_share=cost.cached_share or None)
                text = write_png(image, path, spec, known) if path else infotext(spec, known)
                done += 1
                if path:
                    tell(Event(kind="picture", path=path, step=done, total=len(specs)))
                yield place, Result(image, spec.prompt, spec.seed, text, path, cost)


def composed(pipe: "DiffusionPipeline", spec: GenerateSpec) -> AbstractContextManager[Composition | None]:
    """Return the composition of what a specification names, None if that is nothing."""
    if not spec.adapters and not spec.modifiers:
        return nullcontext()
    return compose(
        pipe,
        load_adapters(spec, pipe),
        method=spec.method,
        weights=weights_of(spec),
        options=spec.options,
        modifiers=spec.modifiers,
    )


def check_writable(path: Path, *, overwrite: bool) -> None:
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
