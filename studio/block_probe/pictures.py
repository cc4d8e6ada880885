"""The two pictures of a block probe: the grid of what was drawn, and bars of what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from studio.block_probe.prompt_pairs import KINDS, Kind
from studio.block_probe.table import ProbeRow, measures

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_SIDE = 96
_LINE = 22
_BAR = 220
_COLORS: dict[Kind, str] = {"content": "#2a6fbb", "style": "#d1742b"}


def draw_grid(pictures: "Mapping[str, Sequence[Picture]]", titles: Sequence[str]) -> "Picture":
    """Return the pictures of each row under their columns' titles."""
    labels = [name.replace("+", "\n+ ") for name in pictures]
    left, wide = _width(labels), max(_SIDE + 8, _width(titles))
    sheet = Image.new("RGB", (left + wide * len(titles), _LINE + (_SIDE + 4) * len(pictures)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((left + wide * column, 4), title, "black", font=_font())
    for row, (label, drawn) in enumerate(zip(labels, pictures.values(), strict=True)):
        top = _LINE + (_SIDE + 4) * row
        pen.multiline_text((6, top + _SIDE // 2), label, "black", font=_font(), anchor="lm")
        for column, picture in enumerate(drawn):
            tile = ImageOps.contain(picture.convert("RGB"), (_SIDE, _SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + wide * column, top))
    return sheet


def draw_bars(rows: Sequence[ProbeRow]) -> "Picture":
    """Return a panel for each measure: two bars a row, content above style.

    A bar without filling stands for a negative number.
    """
    names, left = measures(rows), _width(row.name for row in rows)
    sheet = Image.new("RGB", (left + _BAR * len(names), _LINE * (2 + len(rows))), "white")
    pen = ImageDraw.Draw(sheet)
    for kind, place in zip(KINDS, (6, 86), strict=True):
        pen.rectangle((place, 6, place + 10, 16), _COLORS[kind])
        pen.text((place + 16, 4), kind, "black", font=_font())
    for number, row in enumerate(rows):
        pen.text((6, _LINE * (number + 2) + 3), row.name, "black", font=_font())
    for panel, name in enumerate(names):
        values = [{kind: float(getattr(row.effects[kind], name)) for kind in KINDS} for row in rows]
        most = max(1e-9, *(abs(value) for pair in values for value in pair.values()))
        start = left + _BAR * panel
        pen.text((start, 4), f"{name} (full bar: {most:.3g})", "black", font=_font())
        for number, pair in enumerate(values):
            for kind, below in zip(KINDS, (3, 11), strict=True):
                top = _LINE * (number + 2) + below
                length = round((_BAR - 30) * abs(pair[kind]) / most)
                fill = _COLORS[kind] if pair[kind] >= 0 else None
                pen.rectangle((start, top, start + length, top + 6), fill, _COLORS[kind])
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _width(texts: Iterable[str]) -> int:
    """Return the room that the widest line needs, in pixels."""
    lines = [line for text in texts for line in text.splitlines()]
    return round(max(_font().getlength(line) for line in lines)) + 16
