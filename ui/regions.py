"""Masks of the method ``regions``, one for each adapter that is chosen, and a canvas to paint them on."""

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from studio.errors import DataError
from studio.workspace import Workspace

METHOD = "regions"
_CANVAS = """
<canvas width="256" height="256" aria-label="Paint where the adapter acts"></canvas>
<label>Brush <input type="range" min="4" max="96" value="32"></label>
<button type="button">Clear</button>
"""
_PAINTING = """
const canvas = element.querySelector("canvas"), brush = element.querySelector("input");
const pen = canvas.getContext("2d");
pen.strokeStyle = "white";
pen.lineCap = pen.lineJoin = "round";
const clear = () => pen.clearRect(0, 0, canvas.width, canvas.height);
const place = (event) => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
const draw = (event) => { pen.lineTo(...place(event)); pen.stroke(); };
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pen.lineWidth = Number(brush.value);
  pen.beginPath();
  pen.moveTo(...place(event));
  draw(event);
});
canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) draw(event); });
element.querySelector("button").addEventListener("click", clear);
canvas.take = () => { const painted = canvas.toDataURL(); clear(); return painted; };
"""


class RegionFields:
    """A mask for each adapter: white is its region. It is dropped, or painted on the one canvas below them.

    Args:
        space: Where masks are kept.
        number: The most adapters that can be chosen.

    Attributes:
        masks: In the order of the adapters that are chosen; those of no adapter are not shown.
    """

    def __init__(self, space: Workspace, number: int) -> None:
        self.space, self.number = space, number
        self.masks: list[Any] = []

    def layout(self) -> Any:
        """Place masks and canvas and return what holds them, not seen yet."""
        with gr.Column(visible=False) as group:
            with gr.Row(elem_classes="fields"):
                self.masks = [self._mask(place) for place in range(self.number)]
            with gr.Accordion("Paint a region", open=False, elem_id="paint"):
                gr.HTML(html_template=_CANVAS, js_on_load=_PAINTING, elem_id="paint-canvas")
                self.painted = gr.Textbox(visible=False)
                with gr.Row(elem_classes="buttons"):
                    self.takers = [
                        gr.Button(visible=False, size="sm", elem_id=f"paint-{place + 1}")
                        for place in range(self.number)
                    ]
        return group

    def wire(self) -> None:
        """Connect the buttons below the canvas: each gives what is painted to its adapter."""
        for taker, mask in zip(self.takers, self.masks, strict=True):
            taker.click(
                self.take,
                inputs=self.painted,
                outputs=mask,
                # The canvas gives away what is painted and is clean again.
                js="() => document.querySelector('#paint-canvas canvas').take()",
                show_progress="hidden",
                api_visibility="private",
            )

    @property
    def outputs(self) -> list[Any]:
        """What ``choose`` and ``write`` return updates for."""
        return [*self.masks, *self.takers]

    def take(self, painted: str) -> Any:
        """Return the update of a mask to what is painted, the data URL of a PNG; as it was for nothing."""
        with Image.open(io.BytesIO(base64.b64decode(painted.partition(",")[2]))) as picture:
            mask = _whiteness(picture.convert("RGBA"))
        return str(self._kept(mask)) if mask.getbbox() else gr.skip()

    def choose(self, names: Sequence[str], before: Sequence[str], values: Sequence[Any]) -> list[Any]:
        """Return the updates when adapters are chosen anew; each keeps its mask."""
        own = dict(zip(before, values, strict=False))
        return self.write(names, [own.get(name) for name in names])

    def read(self, names: Sequence[str], values: Sequence[Any]) -> dict[str, str]:
        """Return the masks' files by the names that options use; adapters without a region have none.

        Args:
            names: Of the adapters that are chosen, as options call them.
            values: Of the masks: files, or None.

        Raises:
            DataError: If a file is no picture.
        """
        masks = {name: _opened(value) for name, value in zip(names, values, strict=False) if value}
        return {name: str(self._kept(mask)) for name, mask in masks.items() if mask.getbbox()}

    def write(self, names: Sequence[str], files: Sequence[str | None]) -> list[Any]:
        """Return the updates for adapters and the files of their masks."""
        found = [file if file and Path(file).is_file() else None for file in files]
        shown = list(zip(_padded(names, self.number), _padded(found, self.number), strict=True))
        return [
            *(
                gr.update(visible=name is not None, label=f"Region of {name}", value=file)
                for name, file in shown
            ),
            *(gr.update(visible=name is not None, value=f"Use for {name}") for name, _ in shown),
        ]

    def _mask(self, place: int) -> Any:
        return gr.Image(
            type="filepath",
            sources=["upload"],
            height=170,
            buttons=[],
            visible=False,
            min_width=170,
            placeholder="Drop a mask, white where the adapter acts, or paint one below",
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


def _opened(file: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return _whiteness(picture.convert("RGBA"))
    except OSError:
        raise DataError(f"region: '{Path(file).name}' is no picture. Drop another, or paint one.") from None


def _whiteness(picture: Image.Image) -> Image.Image:
    """Return the brightness of a picture on black."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("L")


def _padded(given: Sequence[Any], number: int) -> list[Any]:
    return [*given[:number], *([None] * (number - len(given)))]
