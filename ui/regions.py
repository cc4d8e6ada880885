"""Masks of the method ``regions`` as pictures to paint on, one for each adapter that is chosen."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from studio.workspace import Workspace

METHOD = "regions"
_SIZE = 256
_PAINT = "#a5b4fc"
"""Seen on black and on white."""


class RegionFields:
    """One canvas for each adapter: what is painted, or white in a picture that is dropped, is its region.

    Args:
        space: Where masks are kept.
        number: The most adapters that can be chosen.

    Attributes:
        canvases: In the order of the adapters that are chosen; those of no adapter are not shown.
    """

    def __init__(self, space: Workspace, number: int) -> None:
        self.space, self.number = space, number
        self.canvases: list[Any] = []

    def layout(self) -> Any:
        """Place the canvases and return what holds them, not seen yet."""
        with gr.Row(visible=False, elem_classes=["fields", "regions"]) as group:
            self.canvases = [self._canvas(place) for place in range(self.number)]
        return group

    def choose(self, names: Sequence[str], before: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """Return the canvases' updates when adapters are chosen anew; each keeps what is painted for it."""
        painted = dict(zip(before, values, strict=False))
        shown = [*before[: self.number], *([None] * (self.number - len(before)))]
        return [
            _labelled(name) | ({} if name == old else {"value": painted.get(name) or _blank()})
            for name, old in zip(_padded(names, self.number), shown, strict=True)
        ]

    def read(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, str]:
        """Return the masks' files by the names that options use; adapters without paint have none.

        Args:
            names: Of the adapters that are chosen, as options call them.
            values: Of the canvases.
        """
        masks = {name: mask_of(value) for name, value in zip(names, values, strict=False)}
        return {name: str(self._kept(mask)) for name, mask in masks.items() if mask is not None}

    def write(self, names: Sequence[str], files: Sequence[str | None]) -> list[Any]:
        """Return the canvases' updates for adapters and the files of their masks."""
        found = [file if file and Path(file).is_file() else _blank() for file in files]
        return [
            _labelled(name) | {"value": file or _blank()}
            for name, file in zip(_padded(names, self.number), _padded(found, self.number), strict=True)
        ]

    def _canvas(self, place: int) -> Any:
        return gr.ImageEditor(
            _blank(),
            type="pil",
            sources=["upload"],
            transforms=(),
            layers=False,
            brush=gr.Brush(colors=[_PAINT], color_mode="fixed", default_size=_SIZE // 8),
            eraser=gr.Eraser(default_size=_SIZE // 8),
            canvas_size=(_SIZE, _SIZE),
            height=300,
            buttons=[],
            visible=False,
            min_width=240,
            elem_id=f"region-{place + 1}",
        )

    def _kept(self, mask: Image.Image) -> Path:
        """Write a mask into the workspace, once for equal ones, and return its file."""
        data = io.BytesIO()
        mask.save(data, "PNG")
        folder = self.space.uploads / "masks"
        folder.mkdir(exist_ok=True)
        path = self.space.inside(folder / f"{hashlib.sha256(data.getvalue()).hexdigest()[:16]}.png")
        path.write_bytes(data.getvalue())
        return path


def mask_of(value: Mapping[str, Any] | None) -> Image.Image | None:
    """Return the mask of a canvas, white where something is painted or its picture is white.

    None for a canvas where nothing is.
    """
    if value is None:
        return None
    parts = [layer.getchannel("A") for layer in value["layers"]]
    if (picture := value["background"]) is not None:
        seen = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        parts.append(seen.convert("L"))
    mask = None
    for part in parts:
        mask = part if mask is None else ImageChops.lighter(mask, part)
    return mask if mask is not None and mask.getbbox() else None


def _blank() -> Image.Image:
    """Return the picture of a canvas where nothing is painted: with one a brush is at hand at once."""
    return Image.new("RGB", (_SIZE, _SIZE), "black")


def _labelled(name: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = gr.update(visible=name is not None, label=f"Region of {name}")
    return shown


def _padded(given: Sequence[Any], number: int) -> list[Any]:
    return [*given[:number], *([None] * (number - len(given)))]
