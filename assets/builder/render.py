"""Render a picture of a subject in a style on a background: the training data, exact and endless.

Styles are plain Pillow filters, so every picture is a function of (subject, style, background, placement).
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from studio.assets.builder.sprites import SPRITES
from studio.assets.builder.subjects import FULL

_SIDES = (0.72, 0.9)
"""Smallest and largest side of a subject, in sides of the picture."""


@dataclass(frozen=True)
class Placement:
    """Where the subject sits: its side and its shifts, in sides of the picture."""

    scale: float = 0.82
    dx: float = 0.0
    dy: float = 0.0
    mirror: bool = False


def random_placement(rng: random.Random, *, cells: int | None = None, large: bool = False) -> Placement:
    """Draw a placement with moderate jitter, so that a small model can learn shapes in few samples.

    Args:
        rng: Source of the choice.
        cells: Align the subject to a grid of so many cells to a side, and never mirror it. Where the cells
            are an autoencoder's patches, a subject gives the same latents wherever it sits: far fewer to
            learn.
        large: With ``cells``, the largest size alone.
    """
    if cells:
        margins = [width for width in range(1, cells) if _SIDES[0] <= 1 - 2 * width / cells <= _SIDES[1]]
        margin = min(margins) if large else rng.choice(margins)
        # One cell of background stays at every border.
        dx, dy = (rng.randint(1 - margin, margin - 1) / cells for _ in range(2))
        return Placement(1 - 2 * margin / cells, dx, dy)
    scale = rng.uniform(*_SIDES)
    room = (1 - scale) / 2
    return Placement(
        scale, rng.uniform(-room, room) * 0.7, rng.uniform(-room, room) * 0.7, rng.random() < 0.5
    )


@cache
def _sprite(name: str) -> Image.Image:
    return Image.open(SPRITES / f"{name}.png").convert("RGBA")


def _place(subject: str, placement: Placement, size: int) -> Image.Image:
    """Return the subject alone on a transparent ``size`` x ``size`` canvas."""
    side = round(placement.scale * size)
    sprite = _sprite(subject)
    if placement.mirror:
        sprite = ImageOps.mirror(sprite)
    canvas = Image.new("RGBA", (size, size))
    left = round((size - side) / 2 + placement.dx * size)
    top = round((size - side) / 2 + placement.dy * size)
    canvas.paste(sprite.resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return canvas


def _on(background: tuple[int, int, int], layer: Image.Image) -> Image.Image:
    picture = Image.new("RGBA", layer.size, (*background, 255))
    picture.alpha_composite(layer)
    return picture.convert("RGB")


def _edges(layer: Image.Image) -> Image.Image:
    """Return the strength of the subject's contours and inner lines as a grey picture (white = edge)."""
    gray = _on((128, 128, 128), layer).convert("L").filter(ImageFilter.GaussianBlur(0.4))
    inner = gray.filter(ImageFilter.FIND_EDGES)
    outline = layer.getchannel("A").filter(ImageFilter.FIND_EDGES)
    edges = ImageChops.lighter(inner, outline)
    # FIND_EDGES marks the border of the picture as an edge.
    frame = Image.new("L", edges.size)
    frame.paste(edges.crop((1, 1, edges.width - 1, edges.height - 1)), (1, 1))
    lines = ImageEnhance.Contrast(frame).enhance(1.6)
    # As wide in a picture of 128 pixels as in one of 64: thinner lines would not survive an autoencoder.
    return lines.filter(ImageFilter.MaxFilter(3)) if layer.width >= 128 else lines


def _plain(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    return _on(background, layer)


def _sketch(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Dark pencil lines straight on the background, the subject itself left unpainted."""
    ink = Image.new("RGB", layer.size, (30, 28, 36))
    return Image.composite(ink, Image.new("RGB", layer.size, background), _edges(layer))


def _pixel(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Square blocks of one colour, 16 to a side."""
    small = _on(background, layer).resize((16, 16), Image.Resampling.BOX)
    return small.resize(layer.size, Image.Resampling.NEAREST)


def _watercolor(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Soft pale washes: blurred, mode-filtered, few tones, lightened."""
    size = layer.width
    wash = _on(background, layer).filter(ImageFilter.GaussianBlur(size / 64))
    wash = ImageOps.posterize(wash.filter(ImageFilter.ModeFilter(5)), 3).filter(
        ImageFilter.GaussianBlur(size / 100)
    )
    mask = layer.getchannel("A").filter(ImageFilter.GaussianBlur(size / 48))
    pale = Image.blend(wash, Image.new("RGB", wash.size, (255, 255, 255)), 0.42)
    return Image.composite(pale, Image.new("RGB", wash.size, background), mask)


def _neon(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Glowing coloured contours on a darkened background."""
    dark = Image.new("RGB", layer.size, (background[0] // 3, background[1] // 3, background[2] // 3))
    edges = _edges(layer)
    tint = ImageEnhance.Color(ImageEnhance.Brightness(_on((90, 90, 90), layer)).enhance(1.5)).enhance(2.2)
    glow = Image.composite(tint, dark, edges.filter(ImageFilter.GaussianBlur(layer.width / 32)))
    bright = Image.blend(tint, Image.new("RGB", layer.size, (255, 255, 255)), 0.45)
    return Image.composite(bright, glow, edges)


def _mosaic(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Tiles of one colour, 16 to a side, with grout between them."""
    size = layer.width
    tiles = 16
    small = _on(background, layer).resize((tiles, tiles), Image.Resampling.BOX)
    picture = small.resize((size, size), Image.Resampling.NEAREST)
    grout = Image.new("RGB", (size, size), (60, 58, 56))
    mask = Image.new("L", (size, size), 255)
    for line in range(tiles + 1):
        at = round(line * size / tiles)
        width = max(1, size // 64)
        mask.paste(0, (at, 0, at + width, size))
        mask.paste(0, (0, at, size, at + width))
    return Image.composite(picture, grout, mask)


def _solid(layer: Image.Image) -> Image.Image:
    """Return where the subject is as a mask of 0 and 255."""
    return layer.getchannel("A").point(lambda value: 255 * (value > 127))


def _cartoon(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Few bold colours inside a thick dark outline."""
    width = max(1, layer.width // 48)
    tones = ImageOps.posterize(
        ImageEnhance.Color(_on(background, layer).filter(ImageFilter.MedianFilter(5))).enhance(1.6), 2
    )
    mask = _solid(layer)
    outline = ImageChops.subtract(
        mask.filter(ImageFilter.MaxFilter(2 * width + 1)), mask.filter(ImageFilter.MinFilter(3))
    )
    bold = ImageEnhance.Brightness(tones).enhance(1.25)
    picture = Image.composite(bold, Image.new("RGB", layer.size, background), mask)
    return Image.composite(Image.new("RGB", layer.size, (20, 18, 24)), picture, outline)


def _gold(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A statue of metal: only light and shadow of the subject are left, from bronze to pale gold."""
    gray = _on((128, 128, 128), layer).convert("L")
    tones = ImageOps.autocontrast(gray, cutoff=2, mask=_solid(layer))
    metal = ImageOps.colorize(tones, black=(74, 42, 4), mid=(214, 158, 26), white=(255, 248, 200))
    return Image.composite(metal, Image.new("RGB", layer.size, background), layer.getchannel("A"))


@cache
def _panes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each pixel's pane ``[size, size]`` and where the lead between panes is."""
    across = 12
    corners = np.stack(np.meshgrid(np.arange(across), np.arange(across), indexing="ij"), -1).reshape(-1, 2)
    jitter = np.random.default_rng(0).uniform(-0.36, 0.36, corners.shape)
    centres = (corners + 0.5 + jitter) * size / across
    y, x = np.mgrid[:size, :size] + 0.5
    pane = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(-1)
    lead = np.zeros((size, size), dtype=bool)
    lead[1:] |= pane[1:] != pane[:-1]
    lead[:, 1:] |= pane[:, 1:] != pane[:, :-1]
    return pane, lead


def _glass(layer: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Irregular panes of one colour, leaded."""
    pane, lead = _panes(layer.width)
    picture = np.asarray(ImageEnhance.Color(_on(background, layer)).enhance(1.4), dtype=np.float64)
    count = np.bincount(pane.ravel())
    colours = [np.bincount(pane.ravel(), picture[..., channel].ravel()) / count for channel in range(3)]
    window = np.stack(colours, -1)[pane]
    window[lead] = (24, 22, 26)
    return Image.fromarray(window.astype(np.uint8))


_PAINTERS = {
    "plain": _plain,
    "sketch": _sketch,
    "pixel": _pixel,
    "watercolor": _watercolor,
    "neon": _neon,
    "mosaic": _mosaic,
    "cartoon": _cartoon,
    "gold": _gold,
    "glass": _glass,
}
assert set(_PAINTERS) == set(FULL.all_styles)


def render(
    subject: str, style: str, background: str, *, placement: Placement | None = None, size: int = 128
) -> Image.Image:
    """Return an RGB picture of ``size`` x ``size`` pixels.

    Args:
        subject: A name in ``FULL.all_subjects``.
        style: A name in ``FULL.all_styles``.
        background: A name in ``FULL.all_backgrounds``.
        placement: Position, size and mirror of the subject; centred when not given.
        size: Side of the picture in pixels.
    """
    layer = _place(subject, placement or Placement(), size)
    return _PAINTERS[style](layer, FULL.all_backgrounds[background])
