"""Tensors that are dear to make, kept in memory or on disk under names that say what they were made of."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from studio.errors import OutputError

Tensors = dict[str, Tensor]
Facts = Mapping[str, object]
"""What a tensor was made of: values that JSON can hold."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file is taken to be of a process that has died."""


class Cache(Protocol):
    """A place that keeps tensors."""

    def get(self, facts: Facts, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors made of ``facts``, from the cache or else by ``make``, on any device."""
        ...


class MemoryCache:
    """A cache that ends with its process."""

    def __init__(self) -> None:
        self._known: dict[str, Tensors] = {}

    def get(self, facts: Facts, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors made of ``facts``, from memory or else by ``make``."""
        name = _name(facts)
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


class DiskCache:
    """A cache that outlives its process: one safetensors file for each entry.

    Files are written aside and then renamed, so an interrupted or a second process at the same work leaves
    whole files only. Each carries a hash of its values; one that does not agree is made again.

    Args:
        folder: Where the files lie; made if needed. It may be deleted at any time.
        settings: What all entries are made with besides their own facts, such as a network's fingerprint.
        tell: Told of each file that had to be made again.

    Raises:
        OutputError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, *, settings: Facts, tell: Callable[[str], None]) -> None:
        # Settings may be long, such as a vocabulary; they go into every entry's name by their hash.
        self._folder, self._settings, self._tell = folder, _name(settings), tell
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.part"):
                # Another process may finish it at this moment.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - unfinished.stat().st_mtime > ABANDONED:
                        unfinished.unlink()
        except OSError as error:
            raise _unwritable(folder, error) from None

    def get(self, facts: Facts, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors made of ``facts``, from their file or else by ``make``, on the CPU.

        Raises:
            OutputError: If they cannot be written.
        """
        path = self._folder / f"{_name({**facts, 'settings': self._settings})}.safetensors"
        if path.is_file():
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError) as error:
                self._tell(f"The cached file {path} is damaged ({error}) and is made again.")
        tensors = {name: value.detach().cpu().contiguous() for name, value in make().items()}
        unfinished = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.part")
        try:
            save_file(tensors, unfinished, metadata={"sha256": _digest(tensors)})
            os.replace(unfinished, path)
        except (SafetensorError, OSError) as error:
            unfinished.unlink(missing_ok=True)
            raise _unwritable(self._folder, error) from None
        return tensors


def network_fingerprint(network: nn.Module) -> str:
    """Return a hash of every value of a network: its parameters, buffers and configuration."""
    digest = hashlib.sha256(str(getattr(network, "config", "")).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return a hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Tensors:
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = (file.metadata() or {}).get("sha256")
    if wanted != _digest(tensors):
        raise ValueError("its values do not agree with their hash")
    return tensors


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _unwritable(folder: Path, error: Exception) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return OutputError(
        f"the cache folder {folder} cannot be written: {reason}. Free space, choose another cache_folder, or "
        "set cache to memory."
    )
