"""The picture of a merge's preview: what each rank would lose."""

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from studio.merging.report import SHARES, MergeReport, MergeRow
from studio.plots import COLORS, font, ticks

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_WIDE, _HIGH = 560, 320
_LEFT, _TOP, _LINE = 56, 28, 18


def draw_curves(report: MergeReport) -> "Picture":
    """Return the error against the rank: a line for each block, a thick black one for all.

    Level lines mark the errors at which ranks are suggested; a ring marks the error of what is written.
    """
    rows = [row for row in report.rows if len(row.curve) > 1]
    longest = max((len(row.curve) - 1 for row in rows), default=1)
    right = _LEFT + _WIDE + 16
    legend = round(max((font().getlength(row.name) for row in rows), default=0)) + 48
    high = max(_TOP + _HIGH + 44, _TOP + _LINE * (len(rows) + 1))
    sheet = Image.new("RGB", (right + legend, high), "white")
    pen = ImageDraw.Draw(sheet)
    _axes(pen, longest)
    for place, row in enumerate(rows):
        color, thick = ("black", 3) if row is report.whole else (COLORS[place % len(COLORS)], 1)
        points = [_point(rank, error, longest) for rank, error in enumerate(row.curve)]
        pen.line(points, color, thick)
        top = _TOP + _LINE * place
        pen.line(((right, top + 8), (right + 20, top + 8)), color, thick)
        pen.text((right + 26, top), row.name, "black", font=font())
    _mark(pen, report.whole, longest)
    return sheet


def _axes(pen: ImageDraw.ImageDraw, longest: int) -> None:
    pen.text((6, 6), "error (Frobenius, relative)", "black", font=font())
    pen.rectangle((_LEFT, _TOP, _LEFT + _WIDE, _TOP + _HIGH), None, "#888888")
    for tenth in range(0, 11, 2):
        _, y = _point(0, tenth / 10, longest)
        pen.text((_LEFT - 8, y), f"{tenth / 10:.1f}", "black", font=font(), anchor="rm")
    for share in SHARES:
        left, y = _point(0, (1 - share) ** 0.5, longest)
        pen.line(((left, y), (left + _WIDE, y)), "#cccccc")
        pen.text((left + _WIDE - 4, y - 2), f"{share:.0%} kept", "#888888", font=font(), anchor="rb")
    for rank in ticks(longest):
        x, y = _point(rank, 0, longest)
        pen.line(((x, y), (x, y + 4)), "#888888")
        pen.text((x, y + 6), str(rank), "black", font=font(), anchor="ma")
    pen.text((_LEFT + _WIDE // 2, _TOP + _HIGH + 24), "rank", "black", font=font(), anchor="ma")


def _mark(pen: ImageDraw.ImageDraw, whole: MergeRow, longest: int) -> None:
    """Draw a ring where the whole curve has the error of what is written."""
    reached = [rank for rank, error in enumerate(whole.curve) if error <= whole.error + 1e-9]
    if reached:
        x, y = _point(reached[0], whole.error, longest)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), None, "black", 2)


def _point(rank: int, error: float, longest: int) -> tuple[float, float]:
    return _LEFT + _WIDE * rank / longest, _TOP + _HIGH * (1 - error)
