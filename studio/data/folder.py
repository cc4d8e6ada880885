"""Folders of pictures, read: every picture decoded once, and all problems told at once."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from studio.data.captions import caption_file, read_caption
from studio.data.decode import SUFFIXES, open_picture
from studio.data.masks import choose_mask, is_picture_file, masks_beside, named_like_a_mask
from studio.data.picture import PLAIN, Picture, PictureSet, Treatment
from studio.errors import DataError

NAMED = 8
"""How many files a message names before it counts the rest."""


@dataclass(frozen=True)
class Subset:
    """Pictures of one folder that are treated alike.

    Attributes:
        folder: Read without its sub-folders.
        paths: Pictures that a list names; None for all of the folder.
        captions: Captions that a list gives, by picture; they win over caption files.
        list_file: The file with that list.
        fallback: Caption of pictures that have none.
        repeats: How many times an epoch holds each picture.
        extension: Ending of caption files.
        prefix: Put in front of every caption.
        suffix: Put behind every caption.
        treatment: How samples are made of the pictures.
        masks: ``file``, ``alpha`` or ``off``.
        mask_folder: Another folder with masks of the pictures' names.
    """

    folder: Path
    paths: tuple[Path, ...] | None = None
    captions: Mapping[Path, str] = field(default_factory=dict)
    list_file: Path | None = None
    fallback: str | None = None
    repeats: int = 1
    extension: str = ".txt"
    prefix: str = ""
    suffix: str = ""
    treatment: Treatment = PLAIN
    masks: str = "file"
    mask_folder: Path | None = None


def read_pictures(
    folder: Path,
    *,
    prompt: str | None = None,
    skip_bad: bool = False,
    treatment: Treatment = PLAIN,
    setting: str = "data",
    prompt_setting: str = "prompt",
) -> PictureSet:
    """Return the pictures of a flat folder.

    Args:
        folder: Read without its sub-folders.
        prompt: Caption of pictures that have none.
        skip_bad: Leave out pictures that cannot be read instead of refusing the folder.
        treatment: How samples are made of them.
        setting: Name of the setting that gives the folder, for messages.
        prompt_setting: Name of the setting that gives the prompt.

    Raises:
        DataError: If the folder is missing or holds no pictures, or some cannot be used: all are named.
    """
    check_folder(folder, setting)
    subset = Subset(folder, fallback=prompt, treatment=treatment)
    return read_subsets([subset], root=folder, skip_bad=skip_bad, prompt_setting=prompt_setting)


def read_subsets(
    subsets: Sequence[Subset], *, root: Path, skip_bad: bool = False, prompt_setting: str = "prompt"
) -> PictureSet:
    """Return the pictures of several folders as one set.

    Args:
        subsets: Where they lie and how they are treated.
        root: The folder or file that named them.
        skip_bad: Leave out pictures that cannot be read instead of refusing them all.
        prompt_setting: Name of the setting that captions pictures without a caption, for messages.

    Raises:
        DataError: If a folder holds no pictures, or some cannot be used: all are named.
    """
    readings = [_read(subset, name=_name(subset.folder, root)) for subset in subsets]
    pictures = tuple(picture for reading in readings for picture in reading.pictures)
    bad = [text for reading in readings for text in reading.bad]
    uncaptioned = [text for reading in readings for text in reading.uncaptioned]
    problems = []
    if bad and not skip_bad:
        problems.append(
            f"{count(len(bad), 'picture')} in {root} cannot be used:\n  {_lines(bad)}\n"
            "Repair or remove them, or set skip_bad (--skip-bad) to go on without them."
        )
    if uncaptioned:
        problems.append(
            f"{count(len(uncaptioned), 'picture')} without a caption and no prompt for them: "
            f"{named(uncaptioned)}. Give {option(prompt_setting)} or write each caption into a "
            f"{subsets[0].extension} file of the picture's name."
        )
    if not problems and not pictures:
        problems.append(f"none of the {count(len(bad), 'picture')} in {root} can be read:\n  {_lines(bad)}")
    if problems:
        raise DataError("\n".join(problems))
    ignored = [text for reading in readings for text in reading.ignored]
    return PictureSet(
        root, pictures, tuple(bad), (*_beside(subsets, root), *ignored), tuple(_notes(pictures))
    )


def check_folder(folder: Path, setting: str) -> None:
    """Return if a folder of pictures is there.

    Raises:
        DataError: If it is missing, is a file or is empty.
    """
    if not folder.exists():
        raise DataError(
            f"the folder {folder} does not exist. Give the folder with the pictures as {option(setting)}."
        )
    if not folder.is_dir():
        raise DataError(
            f"{folder} is a file, not a folder. Give the folder with the pictures as {option(setting)}."
        )
    if not any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise DataError(f"the data folder {folder} is empty. {_WANTED}")


@dataclass
class _Reading:
    pictures: list[Picture] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def _read(subset: Subset, *, name: str) -> _Reading:
    """Read a subset; ``name`` stands in front of its files in messages."""
    masks = masks_beside(subset.folder, more=subset.mask_folder)
    used = {mask for found in masks.values() for mask in found}
    paths = list_pictures(subset)
    reading = _Reading(ignored=[name + text for text in _ignored(subset, paths, used)])
    for path in paths:
        beside = masks if path.parent == subset.folder else masks_beside(path.parent)
        try:
            picture = _picture(path, subset, beside)
        except DataError as error:
            reading.bad.append(f"{name}{error}")
            continue
        if not picture.caption and picture.treatment.trigger is None:
            reading.uncaptioned.append(name + path.name)
        reading.pictures.append(picture)
    return reading


def _picture(path: Path, subset: Subset, masks: Mapping[str, Sequence[Path]]) -> Picture:
    size = open_picture(path).size
    own = subset.captions.get(path)
    if not own:
        file = caption_file(path, subset.extension)
        own = read_caption(file) if file else ""
    caption = own or subset.fallback or ""
    floor = subset.treatment.unmasked_weight
    return Picture(
        path,
        size,
        " ".join(part for part in (subset.prefix, caption, subset.suffix) if part),
        bool(own),
        repeats=subset.repeats,
        treatment=subset.treatment,
        mask=choose_mask(path, size, masks, kind=subset.masks, floor=floor),
    )


def list_pictures(subset: Subset) -> Sequence[Path]:
    """Return the picture files of a subset, masks apart, without opening them.

    Raises:
        DataError: If there are none.
    """
    if subset.paths is not None:
        return subset.paths
    folder = subset.folder
    masks = {mask for found in masks_beside(folder).values() for mask in found}
    paths = sorted(path for path in folder.iterdir() if is_picture_file(path) and path not in masks)
    if not paths:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        names = [entry.name + ("/" if entry.is_dir() else "") for entry in entries]
        only = f", only {named(names)}; sub-folders are read if they are named like 10_dog" if names else ""
        inner = [entry for entry in entries if entry.is_dir() and _holds_pictures(entry)]
        hint = f" Did you mean {inner[0]}?" if inner else f" {_WANTED}"
        raise DataError(f"no pictures in {folder}{only}.{hint}")
    return paths


def _holds_pictures(folder: Path) -> bool:
    return any(
        is_picture_file(path) or (path.is_dir() and any(map(is_picture_file, path.iterdir())))
        for path in folder.iterdir()
    )


def _beside(subsets: Sequence[Subset], root: Path) -> list[str]:
    """Return the names of what lies beside the folders that a folder is made of."""
    used = {subset.folder for subset in subsets}
    return _names(root, used) if all(folder.parent == root for folder in used) else []


def _names(folder: Path, used: Container[Path]) -> list[str]:
    """Return the names of what lies in a folder and is not among what is used."""
    return [
        entry.name + ("/" if entry.is_dir() else "")
        for entry in sorted(folder.iterdir())
        if entry not in used and not entry.name.startswith(".")
    ]


def _ignored(subset: Subset, paths: Sequence[Path], masks: set[Path]) -> list[str]:
    """Return the names of what lies in a folder and is not used."""
    used = {file for path in paths if (file := _caption_file(path, subset.extension))} | set(paths)
    used |= {folder for path in paths for folder in path.parents} | {subset.list_file or subset.folder}
    if subset.masks == "file":
        used |= masks | {mask.parent for mask in masks} - {subset.folder}
    return _names(subset.folder, used)


def _caption_file(path: Path, extension: str) -> Path | None:
    try:
        return caption_file(path, extension)
    except DataError:
        # Told where the picture is read.
        return None


def _notes(pictures: Sequence[Picture]) -> list[str]:
    masklike = [picture.path.name for picture in pictures if named_like_a_mask(picture.path)]
    return (
        [f"named like a mask, but of no picture, so trained on as a picture: {named(masklike)}."]
        if masklike
        else []
    )


def _name(folder: Path, root: Path) -> str:
    """Return what tells a subset's files from those of others: nothing where there is one folder."""
    if folder == root:
        return ""
    return f"{folder.relative_to(root) if folder.is_relative_to(root) else folder}/"


_WANTED = "Put pictures there (" + ", ".join(sorted(suffix[1:] for suffix in SUFFIXES)) + ")."


def option(setting: str) -> str:
    """Return a setting's name and its flag, for messages."""
    return f"{setting} (--{setting.replace('_', '-')})"


def _shown(names: Sequence[str]) -> list[str]:
    rest = len(names) - NAMED
    return [*names[:NAMED], f"and {rest} more"] if rest > 0 else list(names)


def named(names: Sequence[str]) -> str:
    """Return names in a row, the later ones of many only counted."""
    return ", ".join(_shown(names))


def _lines(names: Sequence[str]) -> str:
    return "\n  ".join(_shown(names))


def count(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
