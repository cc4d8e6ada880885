"""The pictures that a training run draws on the way: as `generate` draws and writes them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from studio.adapters.header import file_hash
from studio.composition.engine import compose
from studio.generation import Settings, draw, solver
from studio.models.execution import tiled
from studio.models.prompt_encoding import reading_prompts
from studio.png import EmbeddingFile, Facts, write_png
from studio.specs import GenerateSpec, adapter_names

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from studio.adapters.adapter import Adapter


def draw_samples(
    pipe: "DiffusionPipeline",
    adapter: "Adapter | None",
    specs: Sequence[GenerateSpec],
    paths: Sequence[Path],
) -> "list[Image]":
    """Draw pictures of a run as one batch and write them.

    Args:
        pipe: The plain base.
        adapter: What is trained, as it is now, or None.
        specs: What to draw; only prompt and seed differ. The adapters that they name are the files that one
            adapter goes into; the hashes that they expect are of what there is.
        paths: A file for each, or none.

    Raises:
        OutputError: If a picture cannot be written.
    """
    first = specs[0]
    with ExitStack() as stack:
        sampler = stack.enter_context(solver(pipe, first.scheduler))
        stack.enter_context(reading_prompts(pipe, raw=first.raw_prompt))
        stack.enter_context(tiled(pipe.vae, first.vae_tiling))
        if adapter is not None:
            stack.enter_context(compose(pipe, {"adapter": adapter}))
        images = draw(
            pipe,
            [spec.prompt for spec in specs],
            [spec.seed for spec in specs],
            settings=Settings.of(first),
        )
    for spec, path, image in zip(specs, paths, images, strict=False):
        facts = _facts(adapter, spec, sampler=sampler)
        write_png(image, path, spec, replace(facts, width=image.width, height=image.height))
    return images


def _facts(adapter: "Adapter | None", spec: GenerateSpec, *, sampler: str) -> Facts:
    """Return what a sample's file says beside its specification; nothing of files that are not written."""
    hashes = spec.expected_hashes
    names = adapter_names(spec.adapters)
    embeddings = {}
    if adapter is not None and adapter.tokens:
        # In the last file: the adapter's own, or one beside that of its layers.
        file = spec.adapters[-1].path
        digest = file_hash(file) if str(file) in hashes else ""
        embeddings[str(file)] = EmbeddingFile(next(iter(adapter.tokens)), digest)
    return Facts(
        width=0,
        height=0,
        sampler=sampler.removesuffix("Scheduler"),
        model=Path(spec.base).name.removesuffix(".safetensors"),
        model_hash=hashes[spec.base],
        adapter_hashes={
            name: hashes.get(str(use.path), "") for name, use in zip(names, spec.adapters, strict=True)
        },
        embeddings=embeddings,
    )
