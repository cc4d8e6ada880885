from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.specs import TrainSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of four pictures of two colours, one with a caption of its own."""
    data = tmp_path / "data"
    data.mkdir()
    for index, color in enumerate(("red", "blue", "red", "blue")):
        Image.new("RGB", (72, 64), color).save(data / f"{index}.png")
    (data / "1.txt").write_text("a blue wall")
    return data


@pytest.fixture
def spec(folder: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    """Return a function from changed fields to a short run on the folder."""

    def build(**values: Any) -> TrainSpec:
        given = {
            "data": folder,
            "output": tmp_path / "out" / "dog.safetensors",
            "prompt": "sks dog",
            "steps": 2,
            "batch_size": 2,
            "rank": 2,
            # Fewer layers take less time.
            "exclude": ("down_blocks.1", "up_blocks.1"),
            "warmup_steps": 0,
            "device": "cpu",
        }
        return TrainSpec.model_validate(given | values)

    return build
