"""Errors that too little memory raises are known, and told in one message."""

from pathlib import Path
from typing import Any

import pytest

from studio import cli, drawing
from studio.errors import BaseModelError, MemoryShortage, memory_shortage
from studio.specs import GenerateSpec


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the machine's memory is not enough"),
        (
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "the GPU's memory is not enough",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (BaseModelError("the hub says: out of memory"), None),
    ],
    ids=str,
)
def test_errors_of_memory_are_told_from_others(error: Exception, said: str | None) -> None:
    assert memory_shortage(error) == said
    wrapped = BaseModelError("the base cannot be loaded")
    wrapped.__cause__ = error
    assert memory_shortage(wrapped) == said


def test_the_command_line_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "command", lambda _: run)
    assert cli.main(["merge"]) == 1
    said = capsys.readouterr().err
    assert (
        said == "error: the machine's memory is not enough. Ask for less at once, or close other programs.\n"
    )


def test_drawing_says_what_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise BaseModelError("the base cannot be loaded") from RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."
        )

    monkeypatch.setattr(drawing, "base_to_draw", load)
    spec = GenerateSpec(prompt="a dog", output=tmp_path)
    with pytest.raises(
        MemoryShortage, match=r"machine's memory is not enough: 2 GiB more .* lower batch_size"
    ):
        list(drawing.draw_all([spec], batch_size=1, paths=[], tell=lambda _: None))
