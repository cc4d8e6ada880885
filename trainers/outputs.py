"""The files that hold what was trained: the adapter's, and one for each part that its method names."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.adapters.adapter import Adapter
from studio.adapters.files import save_adapter
from studio.adapters.kinds.full import FullChange
from studio.registry import TRAINERS
from studio.specs.train import TrainSpec
from studio.trainers.base import Trainer
from studio.trainers.estimate import size
from studio.trainers.metadata import time_facts

FP32 = 4
TOKEN_FORMAT = "embedding"
LARGE = 512 * 1024 * 1024
"""Bytes of a file from which on its size is said before training."""


def part_paths(path: Path, spec: TrainSpec) -> dict[str, Path]:
    """Return the files of an adapter's parts beside its own, by the word for the part."""
    method: type[Trainer] = TRAINERS[spec.method]
    return {word: path.with_name(f"{path.stem}-{word}{path.suffix}") for word in method.parts(spec)}


def save_trained(
    adapter: Adapter, path: Path, spec: TrainSpec, *, base: Any, started: float, overwrite: bool
) -> dict[str, Path]:
    """Write an adapter and its parts, and return the files by the word for the part.

    That of the whole is first; its word is empty.

    Args:
        adapter: As the method exported it, with all metadata.
        path: File of the whole.
        spec: The run; gives method and format.
        base: The pipeline that it was trained on.
        started: When training did, in seconds since 1970.
        overwrite: Replace files that are there.

    Raises:
        AdapterError: If the format cannot hold the adapter.
        OutputError: If a file exists or cannot be written.
    """
    method: type[Trainer] = TRAINERS[spec.method]
    parts = {
        word: (file, _named(method.part(adapter, word), file))
        for word, file in part_paths(path, spec).items()
    }
    return {
        word: save_adapter(
            part,
            file,
            # Only a file of its own can hold a token.
            format=spec.file_format if part.changes else TOKEN_FORMAT,
            metadata=time_facts(spec, started=started),
            base=base,
            overwrite=overwrite,
        )
        for word, (file, part) in {"": (path, layers_of(adapter)), **parts}.items()
    }


def layers_of(adapter: Adapter) -> Adapter:
    """Return what the file of the whole holds: the changes of layers, or the token where there are none."""
    return replace(adapter, tokens={}) if adapter.changes else adapter


def size_note(adapter: Adapter) -> str | None:
    """Return what a person should know before training about the file of a large adapter, or None.

    Args:
        adapter: As it is before the first step; its dense changes are written in fp32.
    """
    entries = sum(
        math.prod(change.shape) for change in adapter.changes.values() if isinstance(change, FullChange)
    )
    if entries * FP32 < LARGE:
        return None
    return (
        f"The file will take about {size(entries * FP32)}: it holds a number for each of {entries:,} "
        "weights. Choose fewer layers for a smaller one, or 'sara' or 'lora' for one of megabytes."
    )


def _named(adapter: Adapter, path: Path) -> Adapter:
    metadata = {**adapter.metadata, "ss_output_name": path.stem}
    return replace(adapter, name=path.stem, metadata=metadata)
