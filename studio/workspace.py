"""The folder of everything the page makes: uploads, adapters, pictures, log files and the job queue."""

import os
from dataclasses import dataclass
from pathlib import Path

from studio.errors import OutputError


@dataclass(frozen=True)
class Workspace:
    """The folders below one root.

    Attributes:
        root: Absolute path; ``STUDIO_HOME`` or ``~/.studio``.
    """

    root: Path

    @property
    def uploads(self) -> Path:
        """Pictures and captions given to the page, one folder per set."""
        return self.root / "uploads"

    @property
    def cache(self) -> Path:
        """Files as the page received or showed them."""
        return self.uploads / "cache"

    @property
    def adapters(self) -> Path:
        """Trained adapters."""
        return self.root / "adapters"

    @property
    def pictures(self) -> Path:
        """Generated pictures, one folder per job."""
        return self.root / "pictures"

    @property
    def encoded(self) -> Path:
        """Training pictures and captions as models read them; may be deleted at any time."""
        return self.root / "encoded"

    @property
    def facts(self) -> Path:
        """What was measured of adapters; may be deleted at any time."""
        return self.root / "facts"

    @property
    def runs(self) -> Path:
        """Log files of the worker and of failed jobs."""
        return self.root / "runs"

    @property
    def database(self) -> Path:
        """SQLite file of the job queue."""
        return self.root / "jobs.sqlite"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders whose files the page may show."""
        return (self.uploads, self.adapters, self.pictures, self.runs)

    def inside(self, path: str | Path) -> Path:
        """Return the absolute path with links resolved; relative ones start at the root.

        Raises:
            OutputError: If it leaves the workspace.
        """
        resolved = (self.root / path).resolve()
        if not resolved.is_relative_to(self.root):
            raise OutputError(f"'{path}' lies outside the workspace {self.root}. Choose a path below it.")
        return resolved


def workspace(home: str | Path | None = None) -> Workspace:
    """Return the workspace at ``home``, else ``STUDIO_HOME``, else ``~/.studio``, with its folders made.

    Raises:
        OutputError: If they cannot be made.
    """
    root = Path(home or os.environ.get("STUDIO_HOME") or "~/.studio").expanduser().resolve()
    space = Workspace(root)
    try:
        for folder in space.folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the workspace {root}: {error.strerror or error}. "
            "Set STUDIO_HOME to a folder you may write to."
        ) from None
    return space


def inside_workspace(path: str | Path, *, home: str | Path | None = None) -> Path:
    """Return the absolute path of a file of the workspace.

    Raises:
        OutputError: If it leaves the workspace.
    """
    return workspace(home).inside(path)
