"""A small base model on disk and pictures to train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def tiny_base(tiny_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny SD 1.x base model."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_sd().save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of three pictures with a disc on each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8, 8, 40 + 4 * index, 40 + 4 * index), fill=colour)
        image.save(folder / f"{index}.png")
    return folder
