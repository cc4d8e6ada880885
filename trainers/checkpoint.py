"""The state of a run in one safetensors file, from which it goes on bit for bit."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from studio.errors import OutputError, TrainingError

State = Mapping[str, Any]
"""Tensors, numbers, texts and None in mappings, lists and tuples of any depth."""
UNFINISHED = ".part"


class Checkpoints:
    """The checkpoints of one run, ``000100.safetensors`` after step 100.

    A file is written aside, then renamed: whenever the process is killed, whole checkpoints remain. Each
    carries a hash of all that it holds. Nothing in it is ever executed.

    Args:
        folder: Where they lie; made when the first one is written.
        keep: How many; older ones are removed.
        every: Steps from one to the next, if any are written on the way. Others, of a stop or an end, go when
            a later one is written: of a run that goes on the same ones stay as of one that never stopped.
    """

    def __init__(self, folder: Path, *, keep: int, every: int = 0) -> None:
        self._folder, self._keep, self._every = folder, keep, every

    def steps(self) -> list[int]:
        """Return the steps after which one was written, ascending."""
        return sorted(int(file.stem) for file in self._folder.glob("*.safetensors") if file.stem.isdigit())

    def path(self, step: int) -> Path:
        """Return the file of the one after a step."""
        return self._folder / f"{step:06d}.safetensors"

    def save(self, step: int, state: State) -> Path:
        """Write the state after a step, remove what is older than the last ones, and return the file.

        Raises:
            OutputError: If it cannot be written.
        """
        path = self.path(step)
        unfinished = path.with_suffix(UNFINISHED)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(unfinished, state)
            os.replace(unfinished, path)
            *older, newest = self.steps()
            regular = [old for old in older if not self._every or old % self._every == 0]
            for old in {*older} - {*[*regular, newest][-self._keep :]}:
                self.path(old).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise OutputError(
                f"the checkpoint {path} cannot be written: {getattr(error, 'strerror', None) or error}. Free "
                "space, choose another output, or lower keep_checkpoints."
            ) from None
        return path

    def newest(self, tell: Callable[[str], None]) -> tuple[int, State]:
        """Return step and state of the newest checkpoint that is whole; damaged newer ones are removed.

        Args:
            tell: Told of each damaged one.

        Raises:
            TrainingError: If there is none.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                state = read(path)
            except (OSError, SafetensorError, ValueError) as error:
                damaged[step] = f"the checkpoint {path} is damaged ({error})"
                continue
            for newer, text in damaged.items():
                tell(f"Warning: {text}; going back to the one of step {step}.")
                self.path(newer).unlink(missing_ok=True)
            return step, state
        what = "; ".join(damaged.values()) or f"there is no checkpoint in {self._folder}"
        raise TrainingError(
            f"{what}, so the run cannot go on. Start it anew without resume; checkpoint_every writes "
            "checkpoints on the way."
        )


def read(path: Path) -> State:
    """Return what a checkpoint holds, on the CPU.

    Raises:
        OSError: If it cannot be read.
        SafetensorError: If it is no safetensors file, or was cut off.
        ValueError: If it is not what was written.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata() or {}
    if facts.get("sha256") != _digest(facts.get("state", ""), tensors):
        raise ValueError("its content does not agree with its hash")
    state: State = _unpack(json.loads(facts["state"]), tensors)
    return state


def _write(path: Path, state: State) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, tensors))
    save_file(tensors, path, metadata={"state": text, "sha256": _digest(text, tensors)})
    with path.open("rb+") as file:
        # Renamed before its content is on the disk, it would be empty after a power failure.
        os.fsync(file.fileno())


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON can hold it; tensors go aside, containers get their kind written beside."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # Pairs, because keys may be numbers.
        return {"map": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
