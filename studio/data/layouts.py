"""How pictures may lie: a flat folder, kohya's ``N_name`` folders, or a list in ``metadata.jsonl``."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.data.captions import one_line
from studio.data.folder import Subset, check_folder, named
from studio.data.masks import is_picture_file
from studio.errors import DataError

CONCEPT = re.compile(r"(\d+)_(.+)")
"""kohya's folder names: repeats and what the pictures show."""
LIST = "metadata.jsonl"


def find_subsets(folder: Path, template: Subset, *, setting: str = "data") -> list[Subset]:
    """Return the parts of a folder of any layout.

    Args:
        folder: What the user named.
        template: What all parts have in common; its own folder is not read.
        setting: Name of the setting that gives the folder, for messages.

    Raises:
        DataError: If the folder is missing, empty or of two layouts at once.
    """
    check_folder(folder, setting)
    if (folder / LIST).is_file():
        return [_listed(folder, template)]
    concepts = sorted(entry for entry in folder.iterdir() if entry.is_dir() and CONCEPT.fullmatch(entry.name))
    loose = sorted(entry.name for entry in folder.iterdir() if is_picture_file(entry))
    if concepts and loose:
        raise DataError(
            f"{folder} holds pictures ({named(loose)}) beside folders with repeats in their names "
            f"({named([entry.name for entry in concepts])}). Move the pictures into one of them, or give one "
            f"of them as {setting}."
        )
    return [_concept(entry, template) for entry in concepts or [folder]]


def _concept(folder: Path, template: Subset) -> Subset:
    """Return one folder, its repeats and its caption from its name if that is like ``10_dog``."""
    found = CONCEPT.fullmatch(folder.name)
    if found is None:
        return replace(template, folder=folder)
    repeats, name = int(found[1]), found[2].strip()
    if repeats == 0:
        raise DataError(
            f"{folder}: the name asks for no repeats. Rename it to 1_{found[2]}, or move it away."
        )
    return replace(template, folder=folder, repeats=repeats, fallback=template.fallback or name)


def _listed(folder: Path, template: Subset) -> Subset:
    """Return the pictures that a list names, captions in its ``text``, as in Hugging Face's image folders."""
    file = folder / LIST
    rows = _rows(file)
    problems = []
    captions: dict[Path, str] = {}
    for number, row in rows:
        name, text = row.get("file_name"), row.get("text") or ""
        path = (folder / name) if isinstance(name, str) else folder
        if not isinstance(name, str) or not isinstance(text, str):
            problems.append(f"line {number}: file_name and text must be texts, got {json.dumps(row)[:80]}")
        elif not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"line {number}: {name} lies outside {folder}")
        elif not is_picture_file(path):
            problems.append(f"line {number}: {name} is not there, or not a picture file")
        elif path in captions:
            problems.append(f"line {number}: {name} is listed twice")
        else:
            captions[path] = one_line(text)
    if problems:
        raise DataError(f"{file} cannot be used:\n  " + "\n  ".join(problems) + "\nMend these lines.")
    if not any("text" in row for _, row in rows) and template.fallback is None:
        keys = sorted({key for _, row in rows for key in row} - {"file_name"})
        raise DataError(
            f"{file} has no captions: wanted them as 'text', got {', '.join(keys) or 'nothing else'}. "
            "Rename the key, or give a prompt."
        )
    return replace(template, folder=folder, paths=tuple(captions), captions=captions, list_file=file)


def _rows(file: Path) -> Sequence[tuple[int, dict[str, Any]]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text. Save it as UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error}). Mend the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: wanted an object with file_name and text, got {line!r}.")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{file} lists no pictures. Fill it, or remove it to read the folder itself.")
    return rows
