"""The picture of a plan: a lane for each adapter, what each step costs, and what acts on each layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageColor, ImageDraw

from studio.composing.timeline import Lane, LayerLane, Timeline
from studio.plots import COLORS, LINE, font, text_width, ticks

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_WIDE = 720
_LANE = 40
_GAP = 12
_FULL, _SHALLOW = "#444a57", "#b9bec9"
_EMPTY = "#f1f2f5"
_TALLEST, _LARGEST_MAP = 14, 560


def draw_timeline(found: Timeline) -> "Picture":
    """Return the picture; steps run from left to right.

    The height of an adapter's bar is its weight. Where the rows of the negative prompt have another weight,
    they have a lane of their own, in lighter bars. A hollow bar stands for a negative weight.
    """
    lanes = _lanes(found)
    names = [*(label for label, *_ in lanes), "rows", *_blocks(found.layers)]
    left = text_width(names)
    pixels = _pixels(found.layers)
    below = (_GAP + LINE + pixels * len(found.layers)) if found.layers else 0
    high = LINE + (_LANE + _GAP) * (len(lanes) + 1) + below + 2 * LINE
    sheet = Image.new("RGB", (left + _WIDE + 24, high), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((left, 4), _title(found), "black", font=font())
    most = max((abs(weight or 0.0) for _, _, weights in lanes for weight in weights), default=0) or 1.0
    top = LINE
    for label, color, weights in lanes:
        _bars(pen, label, color, [(weight or 0.0) / most for weight in weights], left, top)
        pen.text((left + _WIDE + 4, top), f"{most:.3g}", "#888888", font=font(10))
        top += _LANE + _GAP
    _evaluations(pen, found, left, top)
    top += _LANE + _GAP
    if found.layers:
        pen.text((left, top), "layer by layer, the denoiser's first on top", "black", font=font())
        top += LINE
        _heat_map(sheet, pen, found, left, top, pixels)
        top += pixels * len(found.layers) + _GAP
    _axis(pen, found.total, left, top)
    return sheet


def _title(found: Timeline) -> str:
    cached = f", {found.cached:.0%} of it cached" if found.cached else ""
    return f"{found.total} steps, {found.relative_cost:.2f} x the base's evaluations{cached}"


def _lanes(found: Timeline) -> list[tuple[str, str, Sequence[float | None]]]:
    """Return label, colour and weights of each lane to draw."""
    lanes: list[tuple[str, str, Sequence[float | None]]] = []
    for place, lane in enumerate(found.lanes):
        color = COLORS[place % len(COLORS)]
        if lane.alike or any(lane.conditional):
            lanes.append((_label(lane), color, lane.conditional))
        if not lane.alike:
            lanes.append((f"{lane.name}\nunconditional", _mixed([(color, 0.45)]), lane.unconditional))
    return lanes


def _label(lane: Lane) -> str:
    return f"{lane.name}\nin {', '.join(lane.regions)}" if lane.regions else lane.name


def _bars(
    pen: ImageDraw.ImageDraw, label: str, color: str, heights: Sequence[float], left: int, top: int
) -> None:
    pen.multiline_text((6, top + _LANE // 2), label, "black", font=font(), anchor="lm", spacing=2)
    pen.rectangle((left, top, left + _WIDE, top + _LANE), _EMPTY)
    for step, height in enumerate(heights):
        if not height:
            continue
        start, end = _columns(left, step, len(heights))
        fill = color if height > 0 else None
        bar = max(1, round(abs(height) * _LANE))
        pen.rectangle((start, top + _LANE - bar, end, top + _LANE), fill, color)


def _evaluations(pen: ImageDraw.ImageDraw, found: Timeline, left: int, top: int) -> None:
    """Draw a brick for each row that the denoiser evaluates, those with cached features lighter."""
    pen.text((6, top + _LANE // 2), "rows", "black", font=font(), anchor="lm")
    most = max(each.full + each.shallow for each in found.passes)
    for step, passes in enumerate(found.passes):
        start, end = _columns(left, step, found.total)
        for brick in range(passes.full + passes.shallow):
            high = top + _LANE - round((brick + 1) * _LANE / most)
            low = top + _LANE - round(brick * _LANE / most) - 2
            pen.rectangle((start, high, end, low), _FULL if brick < passes.full else _SHALLOW)
    pen.text((left + _WIDE + 4, top), str(most), "#888888", font=font(10))


def _heat_map(
    sheet: "Picture", pen: ImageDraw.ImageDraw, found: Timeline, left: int, top: int, pixels: int
) -> None:
    colors = {lane.name: COLORS[place % len(COLORS)] for place, lane in enumerate(found.lanes)}
    rows = [row for lane in found.layers for row in lane.weights.values()]
    most = max(abs(weight) for row in rows for weight in row) or 1.0
    cells = Image.new("RGB", (found.total, len(found.layers)), "white")
    for place, lane in enumerate(found.layers):
        for step in range(found.total):
            shares = [(colors[name], abs(row[step]) / most) for name, row in lane.weights.items()]
            cells.putpixel((step, place), ImageColor.getrgb(_mixed(shares)))
    size = (_WIDE, pixels * len(found.layers))
    sheet.paste(cells.resize(size, Image.Resampling.NEAREST), (left, top))
    for block, (first, count) in _blocks(found.layers).items():
        start = top + pixels * first
        pen.line(((left - 4, start), (left + _WIDE, start)), "#d5d7de" if first else "#888888")
        if pixels * count >= 11:
            middle = start + pixels * count // 2
            pen.text((6, middle), block, "black", font=font(11), anchor="lm")
        pen.line(((left - 4, start), (left - 4, start + pixels * count - 2)), "#888888")


def _axis(pen: ImageDraw.ImageDraw, total: int, left: int, top: int) -> None:
    marked = [1, *(tick for tick in ticks(total) if tick > 1)]
    for step in marked:
        start, end = _columns(left, step - 1, total)
        pen.text(((start + end) / 2, top), str(step), "black", font=font(), anchor="ma")
    pen.text((6, top), "step", "black", font=font())


def _columns(left: int, step: int, total: int) -> tuple[int, int]:
    """Return where a step's column begins and ends, in pixels."""
    start, end = (left + round(_WIDE * place / total) for place in (step, step + 1))
    return start, max(start, end - 2)


def _pixels(layers: Sequence[LayerLane]) -> int:
    """Return how many pixels high a layer is drawn."""
    return max(1, min(_TALLEST, _LARGEST_MAP // max(1, len(layers))))


def _blocks(layers: Sequence[LayerLane]) -> dict[str, tuple[int, int]]:
    """Return the denoiser's blocks, each with the place of its first layer and their number."""
    found: dict[str, tuple[int, int]] = {}
    for place, layer in enumerate(layers):
        parts = layer.name.split(".")[1:]
        block = ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])
        first, count = found.get(block, (place, 0))
        found[block] = first, count + 1
    return found


def _mixed(shares: Sequence[tuple[str, float]]) -> str:
    """Return the mixture of colours on white: each counts as much as its share, all together at most 1."""
    total = sum(share for _, share in shares)
    parts = [(ImageColor.getrgb(color), share / max(1.0, total)) for color, share in shares]
    white = 1 - sum(share for _, share in parts)
    levels = (round(255 * white + sum(rgb[channel] * share for rgb, share in parts)) for channel in range(3))
    return "#" + "".join(f"{level:02x}" for level in levels)
