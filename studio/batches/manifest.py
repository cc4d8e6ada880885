"""``manifest.jsonl`` beside the pictures of a batch: one line for each.

While pictures are drawn it is only ever appended to: one that is drawn anew stands in it again, and the later
line counts. In the end the earlier ones are taken out.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.errors import OutputError
from studio.whole_file import whole_file

NAME = "manifest.jsonl"


class Manifest:
    """The list of the pictures in a folder. Several processes may append to it.

    Args:
        folder: Where they lie.

    Raises:
        OutputError: If it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            if text and not text.endswith("\n"):
                # A process was killed while it wrote; what it began stays, on a line of its own.
                self._append("\n")
        except OSError as error:
            raise OutputError(f"cannot use '{self.path}': {error.strerror or error}.") from None
        self._hashes = {entry["file"]: entry["sha256"] for entry in _entries(text)}

    def add(self, picture: Path, facts: Mapping[str, Any]) -> None:
        """Append a picture, unless it stands there as it is.

        Args:
            picture: Its file.
            facts: What the line says beside name and hash.

        Raises:
            OutputError: If it cannot be written.
        """
        try:
            digest = hashlib.sha256(picture.read_bytes()).hexdigest()
            if self._hashes.get(picture.name) == digest:
                return
            self._append(
                json.dumps({"file": picture.name, "sha256": digest, **facts}, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            raise OutputError(f"cannot write '{self.path}': {error.strerror or error}.") from None
        self._hashes[picture.name] = digest

    def settle(self) -> None:
        """Leave the last line alone of each picture that was drawn anew; no other process may be appending.

        Raises:
            OutputError: If it cannot be read or written.
        """
        try:
            rows = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        except OSError as error:
            raise OutputError(f"cannot use '{self.path}': {error.strerror or error}.") from None
        files = [entry["file"] if (entry := _entry(row)) else None for row in rows]
        last = {file: place for place, file in enumerate(files)}
        kept = [row for place, row in enumerate(rows) if files[place] is None or last[files[place]] == place]
        if len(kept) < len(rows):
            with whole_file(self.path) as unfinished:
                unfinished.write_text("\n".join(kept), encoding="utf-8")

    def _append(self, text: str) -> None:
        # One write to a file that is opened for appending comes whole and never into another's.
        place = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(place, text.encode())
        finally:
            os.close(place)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each picture by its file's name; lines that were not finished are left out."""
    path = folder / NAME
    return (
        {entry["file"]: entry for entry in _entries(path.read_text(encoding="utf-8"))}
        if path.exists()
        else {}
    )


def _entries(text: str) -> list[dict[str, Any]]:
    # Not at other ends of lines, which may stand in a prompt.
    return [entry for row in text.split("\n") if (entry := _entry(row))]


def _entry(row: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(row)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"file", "sha256"} <= entry.keys() else None
