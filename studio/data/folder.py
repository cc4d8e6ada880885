"""A flat folder of pictures: captions in ``.txt`` files beside them, one prompt for those that have none."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from studio.errors import DataError
from studio.specs.train import TrainSpec

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_PIXELS = 100_000_000
"""Largest picture that is decoded; 100 megapixels take 300 MB of memory."""
NAMED = 8
"""How many files a message names before it counts the rest."""


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        path: Its file.
        size: Width and height in pixels, upright (after the EXIF orientation).
        caption: What it shows.
        own_caption: Whether the caption is its own rather than the fallback prompt.
    """

    path: Path
    size: tuple[int, int]
    caption: str
    own_caption: bool

    def open(self) -> Image.Image:
        """Return the picture upright, in RGB, transparent parts on white."""
        return open_picture(self.path)


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a folder in the order of their names.

    Attributes:
        folder: Where they lie.
        pictures: Those to train on.
        skipped: Pictures left out by request, each as ``name: reason``.
        ignored: Names of files and folders beside them that are neither pictures nor captions of one.
    """

    folder: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def read_folder(spec: TrainSpec) -> PictureSet:
    """Return the pictures and captions of ``spec.data``; decodes every picture once to know that it can be.

    Raises:
        DataError: If the folder is missing or holds no pictures, or some cannot be used: all are named.
    """
    return read_pictures(spec.data, prompt=spec.prompt, skip_bad=spec.skip_bad)


def read_pictures(folder: Path, *, prompt: str | None = None, skip_bad: bool = False) -> PictureSet:
    """Return the pictures of a folder.

    Args:
        folder: Read without its sub-folders.
        prompt: Caption of pictures that have none.
        skip_bad: Leave out pictures that cannot be read instead of refusing the folder.

    Raises:
        DataError: As for ``read_folder``.
    """
    paths, ignored = _list(folder)
    pictures: list[Picture] = []
    bad: list[str] = []
    uncaptioned: list[str] = []
    for path in paths:
        try:
            size = open_picture(path).size
            own = _caption(path)
        except DataError as error:
            bad.append(str(error))
            continue
        if not own and not prompt:
            uncaptioned.append(path.name)
        pictures.append(Picture(path, size, own or prompt or "", bool(own)))
    problems = []
    if bad and not skip_bad:
        problems.append(
            f"{_count(len(bad), 'picture')} in {folder} cannot be used:\n  {_lines(bad)}\n"
            "Repair or remove them, or set skip_bad (--skip-bad) to go on without them."
        )
    if uncaptioned:
        problems.append(
            f"{_count(len(uncaptioned), 'picture')} without a caption and no prompt for them: "
            f"{_named(uncaptioned)}. Give a prompt (--prompt) or write each caption into a .txt file of the "
            "picture's name."
        )
    if not problems and not pictures:
        problems.append(
            f"none of the {_count(len(bad), 'picture')} in {folder} can be read:\n  {_lines(bad)}"
        )
    if problems:
        raise DataError("\n".join(problems))
    return PictureSet(folder, tuple(pictures), tuple(bad), tuple(ignored))


def open_picture(path: Path) -> Image.Image:
    """Return a picture upright, in RGB, transparent parts on white; of an animation its first frame.

    Raises:
        DataError: ``name: reason`` if it is not a picture, is damaged or larger than ``MAX_PIXELS``; a
            picture that is too large is not decoded.
    """
    try:
        # Our own limit is checked on the header below, so PIL's warning at a lower one has nothing to add.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(path, image.size)
                image.load()
                return _flatten(ImageOps.exif_transpose(image))
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
    if "A" not in image.getbands() and "a" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def _list(folder: Path) -> tuple[list[Path], list[str]]:
    if not folder.exists():
        raise DataError(
            f"the data folder {folder} does not exist. Give the folder with the training pictures (--data)."
        )
    if not folder.is_dir():
        raise DataError(
            f"{folder} is a file, not a folder. Give the folder with the training pictures (--data)."
        )
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    paths = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    wanted = "Put pictures there (" + ", ".join(sorted(suffix[1:] for suffix in SUFFIXES)) + ")."
    if not entries:
        raise DataError(f"the data folder {folder} is empty. {wanted}")
    if not paths:
        names = [entry.name + ("/" if entry.is_dir() else "") for entry in entries]
        raise DataError(f"no pictures in {folder}, only {_named(names)}; sub-folders are not read. {wanted}")
    captions = {path.with_suffix(".txt") for path in paths}
    ignored = [
        entry.name + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry not in captions and entry not in set(paths)
    ]
    return paths, ignored


def _caption(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.is_file():
        return ""
    try:
        # A byte order mark, as some editors write, is not part of the caption.
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise DataError(f"{file.name}: the caption is not UTF-8 text") from None


def _shown(names: Sequence[str]) -> list[str]:
    rest = len(names) - NAMED
    return [*names[:NAMED], f"and {rest} more"] if rest > 0 else list(names)


def _named(names: Sequence[str]) -> str:
    return ", ".join(_shown(names))


def _lines(names: Sequence[str]) -> str:
    return "\n  ".join(_shown(names))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
