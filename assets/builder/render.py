"""Render a picture of a subject in a style on a background: the training data, exact and endless.

Styles are plain Pillow filters, so every picture is a function of (subject, style, background, placement).
"""

import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from studio.assets.builder.sprites import SPRITES
from studio.assets.builder.subjects import ALL_BACKGROUNDS, ALL_STYLES


@dataclass(frozen=True)
class Placement:
    """Where the subject sits: its side and its shifts, in sides of the picture."""

    scale: float = 0.82
    dx: float = 0.0
    dy: float = 0.0
    mirror: bool = False


def random_placement(rng: random.Random) -> Placement:
    """Draw a placement with moderate jitter, so that a small model can learn shapes in few samples."""
    scale = rng.uniform(0.72, 0.9)
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
    return ImageEnhance.Contrast(frame).enhance(1.6)


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


_PAINTERS = {
    "plain": _plain,
    "sketch": _sketch,
    "pixel": _pixel,
    "watercolor": _watercolor,
    "neon": _neon,
    "mosaic": _mosaic,
}
assert set(_PAINTERS) == set(ALL_STYLES)


def render(
    subject: str, style: str, background: str, *, placement: Placement | None = None, size: int = 64
) -> Image.Image:
    """Return an RGB picture of ``size`` x ``size`` pixels.

    Args:
        subject: A name in ``ALL_SUBJECTS``.
        style: A name in ``ALL_STYLES``.
        background: A name in ``ALL_BACKGROUNDS``.
        placement: Position, size and mirror of the subject; centred when not given.
        size: Side of the picture in pixels.
    """
    layer = _place(subject, placement or Placement(), size)
    return _PAINTERS[style](layer, ALL_BACKGROUNDS[background])
