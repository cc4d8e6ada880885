"""Pictures with the statistics of photographs and drawings, of our own making, for the autoencoder.

Dead leaves (overlapping shapes of all sizes) over power-law noise have the edges, the grain and the spectra
of natural pictures, "Learning to See by Looking at Noise", arXiv:2106.05963; strokes and tilings stand for
drawings.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_MOST_LEAVES = 60


def texture(rng: np.random.Generator, *, size: int) -> Image.Image:
    """Return an RGB picture of ``size`` x ``size`` pixels: shapes over noise, shaded, some blurred."""
    picture = _to_picture(_field(rng, size))
    for radius in sorted(_radii(rng, size), reverse=True):
        _add_leaf(picture, rng, radius)
    if rng.random() < 0.25:
        _add_tiling(picture, rng)
    shaded = _to_picture(np.asarray(picture, dtype=np.float32) * _shade(rng, size)[..., None])
    blur = float(rng.choice((0.0, 0.0, 0.5, 1.0))) * size / 128
    return shaded.filter(ImageFilter.GaussianBlur(blur)) if blur else shaded


def _radii(rng: np.random.Generator, size: int) -> list[float]:
    """Return radii in pixels whose density falls with their cube, so that no scale stands out."""
    least, most = size / 32, size / 2
    share = rng.random(int(rng.integers(_MOST_LEAVES)))
    return [float(radius) for radius in 1 / np.sqrt(share / least**2 + (1 - share) / most**2)]


def _add_leaf(picture: Image.Image, rng: np.random.Generator, radius: float) -> None:
    """Paint one shape: flat, filled with noise, or only its outline."""
    size = picture.width
    corners = _corners(rng, size, radius)
    kind = rng.random()
    if kind < 0.1:
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        picture.paste(_to_picture(_field(rng, size)), mask=mask)
    elif kind < 0.35:
        width = int(rng.integers(1, max(2, size // 32)))
        ImageDraw.Draw(picture).line([*corners, corners[0]], fill=_colour(rng), width=width)
    else:
        ImageDraw.Draw(picture).polygon(corners, fill=_colour(rng))


def _corners(rng: np.random.Generator, size: int, radius: float) -> list[tuple[float, float]]:
    """Return the corners of an ellipse, or of a polygon of three to seven corners, anywhere."""
    round_ = rng.random() < 0.5
    angles = (np.arange(24) / 24 if round_ else np.sort(rng.random(int(rng.integers(3, 8))))) * 2 * math.pi
    x, y = np.cos(angles) * radius, np.sin(angles) * radius * rng.uniform(0.4, 1)
    turn, centre = rng.random() * math.pi, rng.random(2) * size
    across = centre[0] + x * math.cos(turn) - y * math.sin(turn)
    down = centre[1] + x * math.sin(turn) + y * math.cos(turn)
    return [(float(a), float(b)) for a, b in zip(across, down, strict=True)]


def _add_tiling(picture: Image.Image, rng: np.random.Generator) -> None:
    """Draw parallel lines across the picture in one direction or in two."""
    size = picture.width
    pencil, colour = ImageDraw.Draw(picture), _colour(rng)
    period, width = rng.uniform(size / 32, size / 6), int(rng.integers(1, max(2, size // 40)))
    angle = float(rng.choice((0.0, 0.0, rng.random()))) * math.pi
    for turn in (angle, angle + math.pi / 2)[: int(rng.integers(1, 3))]:
        along = size * np.array([math.cos(turn), math.sin(turn)])
        for shift in np.arange(-size, size, period):
            middle = size / 2 + shift * np.array([-math.sin(turn), math.cos(turn)])
            pencil.line([*(middle - along), *(middle + along)], fill=colour, width=width)


def _field(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return ``[size, size, 3]`` power-law noise, coloured as nature is: mostly in brightness."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * frequency ** -rng.uniform(0.6, 2.0)
    planes = np.fft.irfft2(spectrum, (size, size))
    planes /= planes.std((1, 2), keepdims=True)
    colours = np.array([[1.0, 0.0, 0.0]] * 3) + rng.uniform(0, 0.5) * rng.standard_normal((3, 3))
    field: np.ndarray = np.einsum("ck,kyx->yxc", colours, planes) * rng.uniform(10, 60)
    return field + rng.uniform(30, 225, 3)


def _shade(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a smooth fall of light across the picture ``[size, size]``, around 1."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.random() * 2 * math.pi
    light: np.ndarray = 1 + rng.uniform(0, 0.6) * (x * math.cos(angle) + y * math.sin(angle))
    return light


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _to_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
