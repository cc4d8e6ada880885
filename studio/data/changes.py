"""Whether a data set is still the one that a run began with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from studio.data.cache import file_fingerprint
from studio.data.dataset import DataSet
from studio.data.folder import named
from studio.data.picture import Picture
from studio.errors import DataError


def snapshot(data: DataSet) -> dict[str, str]:
    """Return a hash of each picture by its name: of its content, mask, caption, repeats and treatment."""
    sets = {"": data.pictures, "class ": data.class_pictures, "held-out ": data.validation}
    return {
        f"{kind}{picture.path.parent.name}/{picture.path.name}": _fingerprint(picture)
        for kind, found in sets.items()
        if found
        for picture in found.pictures
    }


def check_unchanged(before: Mapping[str, str], data: DataSet) -> None:
    """Return if a data set is the one of a snapshot.

    Args:
        before: The snapshot of when the run began.
        data: What is there now.

    Raises:
        DataError: Names the pictures that were added, removed or changed.
    """
    now = snapshot(data)
    found = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    lines = [f"{what}: {named(names)}" for what, names in found.items() if names]
    if lines:
        raise DataError(
            "the pictures, captions or their settings are no longer those that the run began with:\n  "
            + "\n  ".join(lines)
            + "\nA run that goes on would train on other samples. Restore them, or start a new run."
        )


def _fingerprint(picture: Picture) -> str:
    facts = {
        "content": file_fingerprint(picture.path),
        "mask": file_fingerprint(picture.mask) if picture.mask else None,
        "caption": picture.caption,
        "repeats": picture.repeats,
        "treatment": asdict(picture.treatment),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
