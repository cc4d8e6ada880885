"""The two pictures of a block probe: the grid of what was drawn, and bars of what was measured."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from studio.block_probe.prompt_pairs import KINDS, Kind
from studio.block_probe.table import ProbeRow, measures
from studio.plots import COLORS, LINE, GridRow, draw_grid, font, text_width

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_BAR = 220
_COLORS: dict[Kind, str] = dict(zip(KINDS, COLORS, strict=False))


def draw_looks(pictures: "Mapping[str, Sequence[Picture]]", titles: Sequence[str]) -> "Picture":
    """Return the pictures of each row under their columns' titles."""
    return draw_grid([GridRow(name.replace("+", "\n+ "), drawn) for name, drawn in pictures.items()], titles)


def draw_bars(rows: Sequence[ProbeRow]) -> "Picture":
    """Return a panel for each measure: two bars a row, content above style.

    A bar without filling stands for a negative number.
    """
    names, left = measures(rows), text_width(row.name for row in rows)
    sheet = Image.new("RGB", (left + _BAR * len(names), LINE * (2 + len(rows))), "white")
    pen = ImageDraw.Draw(sheet)
    for kind, place in zip(KINDS, (6, 86), strict=True):
        pen.rectangle((place, 6, place + 10, 16), _COLORS[kind])
        pen.text((place + 16, 4), kind, "black", font=font())
    for number, row in enumerate(rows):
        pen.text((6, LINE * (number + 2) + 3), row.name, "black", font=font())
    for panel, name in enumerate(names):
        values = [{kind: float(getattr(row.effects[kind], name)) for kind in KINDS} for row in rows]
        most = max(1e-9, *(abs(value) for pair in values for value in pair.values()))
        start = left + _BAR * panel
        pen.text((start, 4), f"{name} (full bar: {most:.3g})", "black", font=font())
        for number, pair in enumerate(values):
            for kind, below in zip(KINDS, (3, 11), strict=True):
                top = LINE * (number + 2) + below
                length = round((_BAR - 30) * abs(pair[kind]) / most)
                fill = _COLORS[kind] if pair[kind] >= 0 else None
                pen.rectangle((start, top, start + length, top + 6), fill, _COLORS[kind])
    return sheet
