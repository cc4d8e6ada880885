from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.errors import OutputError
from studio.trainers import checkpoint
from studio.trainers.checkpoint import Checkpoints, read


def state(number: float = 1.0) -> dict[str, Any]:
    shared = torch.arange(6.0).view(2, 3)
    return {
        "numbers": [1, 2.5, True, None, float("inf"), number],
        "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, 1: {}},
        "parameters": [shared, shared, shared.T, torch.tensor([True, False]), torch.empty(0)],
        "half": (torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.uint8)),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def test_what_is_written_is_read_again_with_its_types(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path / "c", keep=2).save(7, state())
    assert path.name == "000007.safetensors" and same(dict(read(path)), state())


def test_what_it_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold object"):
        Checkpoints(tmp_path, keep=1).save(1, {"odd": object()})
    assert not list(tmp_path.iterdir())


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        kept.save(step, state(step))
    assert kept.steps() == [2, 10]
    step, found = kept.newest(print)
    assert step == 10 and found["numbers"][-1] == 10


@pytest.mark.parametrize(
    "spoil", [lambda text: text.replace("2.5", "2.6"), lambda text: text], ids=["text", "none"]
)
def test_a_single_changed_value_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str], str]
) -> None:
    write = checkpoint.save_file
    monkeypatch.setattr(
        checkpoint,
        "save_file",
        lambda tensors, path, metadata: write(
            tensors, path, metadata={**metadata, "state": spoil(metadata["state"])}
        ),
    )
    path = Checkpoints(tmp_path, keep=1).save(1, state())
    if spoil("2.5") == "2.5":
        read(path)
    else:
        with pytest.raises(ValueError, match="does not agree with its hash"):
            read(path)


def test_an_error_while_writing_leaves_nothing_behind_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, state())
    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(
        OutputError, match=r"000002\.safetensors cannot be written: No space left.*Free space"
    ):
        kept.save(2, state())
    assert [path.name for path in tmp_path.iterdir()] == ["000001.safetensors"]
