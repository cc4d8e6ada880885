"""What drawn tables and time lines share: letters, colours, ticks, and pictures under titles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LINE = 22
"""Pixels from one line of text to the next."""
COLORS = ("#2a6fbb", "#d1742b", "#3a9a5b", "#8e5bb5", "#b53b4a", "#6b6b6b", "#1f9aa8", "#a58b1f", "#7a4a2b")
"""Told apart next to each other; to be taken in this order."""
_GAP = 4
_NOTE = 420  # pixels in which notes are readable
_LETTER = 7.2  # pixels of a letter of running text


@dataclass(frozen=True)
class GridRow:
    """A row of pictures.

    Attributes:
        label: In front of them; may have several lines.
        pictures: As many as there are titles, or none where there is something to say instead.
        note: Under them.
    """

    label: str
    pictures: "Sequence[Picture]"
    note: str = ""


def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the letters that all drawings are labelled with."""
    return ImageFont.load_default(size)


def text_width(texts: Iterable[str]) -> int:
    """Return the room that the widest line needs, in pixels."""
    lines = [line for text in texts for line in text.splitlines()]
    return round(max((font().getlength(line) for line in lines), default=0)) + 16


def ticks(longest: int) -> range:
    """Return at most eleven round numbers from 0 to ``longest``."""
    steps = (step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power))
    return range(0, longest + 1, next(step for step in steps if longest <= 10 * step))


def draw_grid(rows: Sequence[GridRow], titles: Sequence[str], *, side: int = 96) -> "Picture":
    """Return pictures in rows under their columns' titles, each made to fit a square of ``side`` pixels.

    Titles may have several lines.
    """
    left, wide = text_width(row.label for row in rows), max(side + 2 * _GAP, text_width(titles))
    room = max(wide * len(titles), _NOTE if any(row.note for row in rows) else 0)
    notes = [wrap(row.note, round(room / _LETTER)) for row in rows]
    heights = [
        max(side if row.pictures else 0, LINE * (1 + row.label.count("\n"))) + _GAP + LINE * len(note)
        for row, note in zip(rows, notes, strict=True)
    ]
    top = LINE * max(1 + title.count("\n") for title in titles)
    sheet = Image.new("RGB", (left + room, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((left + wide * column, _GAP), title, "black", font=font())
    for row, note, height in zip(rows, notes, heights, strict=True):
        middle = top + (height - LINE * len(note)) // 2
        pen.multiline_text((6, middle), row.label, "black", font=font(), anchor="lm")
        for column, picture in enumerate(row.pictures):
            tile = ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + wide * column, top))
        for number, line in enumerate(note):
            below = top + height - LINE * (len(note) - number)
            pen.text((left, below), line, "#555555", font=font())
        top += height
    return sheet
