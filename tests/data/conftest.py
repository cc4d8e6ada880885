from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.specs import TrainSpec

Save = Callable[..., Path]


@pytest.fixture
def save() -> Save:
    """Return a function that writes a picture, and its caption if one is given."""

    def write(
        path: Path,
        *,
        size: tuple[int, int] = (24, 16),
        color: Any = "red",
        mode: str = "RGB",
        caption: str | None = None,
        **how: Any,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, color).save(path, **how)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., TrainSpec]:
    """Return a function from changed fields to a specification of the test's own folder."""

    def build(**values: Any) -> TrainSpec:
        return TrainSpec.model_validate({"data": tmp_path, "output": "x.safetensors"} | values)

    return build
