"""Sets of training pictures: the example that ships with the studio and what is dropped on the page."""

import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path

from studio.errors import DataError
from studio.workspace import Workspace

KEPT_DAYS = 7
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EXAMPLE = "robot"
_SET = "set"


def example_set(space: Workspace, name: str = EXAMPLE) -> Path | None:
    """Return the folder of an example set, copied into the workspace, or None where it is not installed."""
    source = files("studio.assets") / "examples" / name
    if not source.is_dir():
        return None
    folder = space.uploads / f"example-{name}"
    folder.mkdir(exist_ok=True)
    for item in source.iterdir():
        target = folder / item.name
        if item.name.endswith((*PICTURES, ".txt")) and not target.exists():
            target.write_bytes(item.read_bytes())
    return folder


def keep_uploads(space: Workspace, uploaded: Sequence[str | Path]) -> Path:
    """Copy dropped files into a new folder of the workspace and return it.

    Raises:
        DataError: If two files share a name, or none is a picture.
    """
    names = [Path(path).name for path in uploaded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two files are named {', '.join(twice)}. Give them different names.")
    if not any(name.lower().endswith(PICTURES) for name in names):
        raise DataError(
            f"none of {len(names)} files is a picture ({', '.join(PICTURES)}). Drop pictures as well."
        )
    folder = space.inside(space.uploads / unique(_SET))
    folder.mkdir()
    for path in uploaded:
        shutil.copyfile(path, folder / Path(path).name)
    return folder


def clean_uploads(
    space: Workspace, *, in_use: Collection[str | Path], now: float | None = None
) -> list[Path]:
    """Remove what was dropped on the page more than ``KEPT_DAYS`` days ago and return what it was.

    Sets of pictures and files of the page's cache: copies, whose originals the user has. Links are removed,
    never followed, and where the folder of uploads itself leads out of the workspace nothing is touched.

    Args:
        space: Whose uploads.
        in_use: Sets that are still needed.
        now: Seconds since the epoch; default: the clock's.
    """
    if space.uploads.resolve() != space.uploads:
        return []
    limit = (time.time() if now is None else now) - KEPT_DAYS * 24 * 3600
    kept = {Path(path) for path in in_use}
    cache = space.cache.iterdir() if space.cache.is_dir() and not space.cache.is_symlink() else ()
    old = [
        path
        for path in (*space.uploads.glob(f"{_SET}-*"), *cache)
        if path not in kept and path.lstat().st_mtime < limit
    ]
    for path in old:
        # What cannot be removed now is tried again when the page starts the next time.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return old


def captioned(folder: Path | None) -> list[tuple[str, str]]:
    """Return the pictures of a folder with their captions, as a gallery takes them."""
    if folder is None or not folder.is_dir():
        return []
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    return [(str(path), _caption(path.with_suffix(".txt"))) for path in pictures]


def unique(word: str) -> str:
    """Return a name that no other call returns and that sorts by time."""
    return f"{word}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def _caption(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
