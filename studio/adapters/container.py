"""Write a safetensors file whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from studio.adapters.header import encode_header
from studio.adapters.metadata import hashes
from studio.errors import OutputError
from studio.whole_file import whole_file


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that no file can or may be written to.

    Raises:
        OutputError: If the name is no .safetensors name, or something is in the way.
    """
    if path.suffix != ".safetensors":
        raise OutputError(
            f"adapters are .safetensors files, got '{path.name}'. Name it '{path.stem}.safetensors'."
        )
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file.")
    if blocking := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        raise OutputError(f"{path} cannot be written: {blocking[0]} is not a folder. Choose another folder.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Choose another name or pass --overwrite.")


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, metadata and hashes under a temporary name and rename it, so that no half file is seen.

    Equal input makes equal bytes. Folders on the way are made.

    Raises:
        OutputError: If the disk is full or refuses.
    """
    packed = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(packed[:8], "little")
    entries = json.loads(packed[8:start])
    data = memoryview(packed)[start:]
    # The library writes metadata in random order, so the header is encoded anew.
    header = encode_header(entries, {**metadata, **hashes(entries, data, metadata)})
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(header)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
