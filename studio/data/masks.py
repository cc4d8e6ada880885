"""Loss masks: files beside pictures, or their alpha channels."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from studio.data.decode import SUFFIXES, open_alpha, open_mask
from studio.errors import DataError

ENDS = (".mask", "-mask", "-masklabel")
"""What a mask's name has behind its picture's; the last is OneTrainer's."""
FOLDERS = ("mask", "masks")
"""Sub-folders in which masks have their pictures' names."""


def is_picture_file(path: Path) -> bool:
    """Say whether a file's name is that of a picture."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def named_like_a_mask(path: Path) -> bool:
    """Say whether a picture file has a mask's name, whether or not there is a picture it belongs to."""
    return path.stem.endswith(ENDS)


def masks_beside(folder: Path, *, more: Path | None = None) -> dict[str, list[Path]]:
    """Return the masks of a folder's pictures by the pictures' stems.

    A file that is named like a mask of a picture that is not there is no mask.

    Args:
        folder: Holds the pictures.
        more: Another folder with masks of the pictures' names.
    """
    files = sorted(path for path in folder.iterdir() if is_picture_file(path))
    stems = {path.stem for path in files}
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        for end in ENDS:
            stem = path.stem.removesuffix(end)
            if stem != path.stem and stem in stems:
                found[stem].append(path)
    folders = [folder / name for name in FOLDERS] + ([more] if more else [])
    for place in folders:
        if place.is_dir():
            for path in sorted(path for path in place.iterdir() if is_picture_file(path)):
                found[path.stem].append(path)
    return found


def choose_mask(
    picture: Path, size: tuple[int, int], masks: Mapping[str, Sequence[Path]], *, kind: str, floor: float
) -> Path | None:
    """Return the file that holds a picture's mask, the picture's own for its alpha channel, or None.

    Args:
        picture: The picture's file.
        size: Its width and height in pixels, upright.
        masks: Mask files by stem.
        kind: ``file``, ``alpha`` or ``off``.
        floor: Weight of the loss where a mask is black.

    Raises:
        DataError: If there are several, it cannot be read, is of another size, or leaves nothing to train on.
    """
    if kind == "off":
        return None
    if kind == "alpha":
        image, file = open_alpha(picture), picture
        if image is None:
            return None
    else:
        found = masks.get(picture.stem, ())
        if len(found) > 1:
            raise DataError(
                f"{picture.name}: several masks, {', '.join(file.name for file in found)}. Remove all but one"
            )
        if not found:
            return None
        file = found[0]
        image = open_mask(file)
    if image.size != size:
        raise DataError(
            f"{file.name}: the mask has {image.width} x {image.height} px, its picture {picture.name} "
            f"{size[0]} x {size[1]} px. Save the mask in the picture's size"
        )
    if floor == 0 and image.getextrema() == (0, 0):
        what = "transparent" if kind == "alpha" else "black"
        raise DataError(f"{file.name}: {what} everywhere, so nothing of it would be trained on")
    return file
