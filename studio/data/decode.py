"""Picture files decoded: upright, in RGB or as a mask, with every kind of damage told in one line."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from studio.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_PIXELS = 100_000_000
"""Largest picture that is decoded; 100 megapixels take 300 MB of memory."""

T = TypeVar("T")


def open_picture(path: Path) -> Image.Image:
    """Return a picture upright, in RGB, transparent parts on white; of an animation its first frame.

    Raises:
        DataError: ``name: reason`` if it is not a picture, is damaged or larger than ``MAX_PIXELS``; a
            picture that is too large is not decoded.
    """
    return _decode(path, _flatten)


def open_mask(path: Path) -> Image.Image:
    """Return a mask file upright, in 8-bit grey: white is trained on, black is not.

    Raises:
        DataError: As for ``open_picture``.
    """
    return _decode(path, lambda image: _flatten(image).convert("L"))


def open_alpha(path: Path) -> Image.Image | None:
    """Return a picture's alpha channel, upright, in 8-bit grey, or None where it has none.

    Raises:
        DataError: As for ``open_picture``.
    """
    return _decode(path, _alpha)


def _decode(path: Path, convert: Callable[[Image.Image], T]) -> T:
    try:
        # Our own limit is checked on the header below, so PIL's warning at a lower one has nothing to add.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image.size)
                image.load()
                return convert(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        _check_size(path, _header_size(path))
        raise DataError(f"{path.name}: a part of it is larger than PIL decodes safely") from None
    except UnidentifiedImageError:
        raise DataError(f"{path.name}: not a picture, or damaged at its start") from None
    # Decoders report damage by all of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, ArithmeticError) as error:
        raise DataError(f"{path.name}: cannot be read, perhaps damaged or cut short ({error})") from None


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path.name}: {width:,} x {height:,} px is too large, at most {MAX_PIXELS:,} pixels are "
            "decoded; make it smaller"
        )


def _header_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header alone, past the size guard of ``Image.open``."""
    with path.open("rb") as file:
        prefix = file.read(16)
        for factory, accepts in Image.OPEN.values():
            if accepts is None or accepts(prefix) is not True:
                continue
            file.seek(0)
            size: tuple[int, int] = factory(file, str(path)).size
            return size
    return (0, 0)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL cuts 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray(
            (numpy.asarray(image).astype(numpy.float32) / 257).round().astype(numpy.uint8)
        )
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit grey, of which black and white are not known; save it with 8 or 16 bits")
    if not _has_alpha(image):
        return image.convert("RGB")
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if _has_alpha(image) else None


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
