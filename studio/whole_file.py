"""Files that are written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studio.errors import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the place to write a file to, in its folder; the file gets its name when the block ends well.

    Folders on the way are made, and what is left of a block that does not end well is removed.

    Args:
        path: The file, which is replaced if it is there.

    Raises:
        OutputError: If it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or choose another folder."
        ) from None
    finally:
        # Gone after the rename; where even this fails, the first error has said why.
        with contextlib.suppress(OSError):
            unfinished.unlink()
