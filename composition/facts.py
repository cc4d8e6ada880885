"""Facts that were measured of adapters and bases, kept in the workspace and never in the user's files.

A fact is a JSON object under a kind ("layer-sums") and a key, a text that names everything it was measured
on, such as an adapter's content and the base's fingerprint. Each lies in a file of its own, which is written
aside and then renamed; one that is damaged or of another version is as good as none. The folder may be
deleted at any time.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.adapters.adapter import Adapter
from studio.errors import OutputError
from studio.whole_file import whole_file
from studio.workspace import workspace

logger = logging.getLogger(__name__)
VERSION = 1
"""Of the files' layout and of what the kinds in use mean."""


def get(kind: str, key: str) -> dict[str, Any] | None:
    """Return a fact, or None if it is not known."""
    try:
        path = _path(kind, key)
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, OutputError, ValueError, RecursionError) as error:
        logger.warning("a measured fact (%s) cannot be read, it is measured anew: %s", kind, error)
        return None
    wanted = {"version": VERSION, "kind": kind, "key": key}
    whole = isinstance(document, dict) and isinstance(document.get("value"), dict)
    if not whole or document != {**wanted, "value": document["value"], "sha256": _digest(document["value"])}:
        logger.warning("%s is damaged or of another version; the fact is measured anew.", path)
        return None
    return dict(document["value"])


def put(kind: str, key: str, value: Mapping[str, Any]) -> None:
    """Keep a fact in place of the one before; where the workspace cannot be written, say so and go on.

    Args:
        kind: What it says; letters, digits and hyphens.
        key: What it was measured on.
        value: What JSON can hold, with text for keys; numbers must be finite.
    """
    document = {"version": VERSION, "kind": kind, "key": key, "value": value, "sha256": _digest(value)}
    try:
        with whole_file(_path(kind, key)) as unfinished:
            unfinished.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    except OutputError as error:
        logger.warning("a measured fact (%s) cannot be kept, it will be measured again: %s", kind, error)


def content_hash(adapter: Adapter) -> str:
    """Return a sha256 over an adapter's changes and tokens: names, sizes, types and every number.

    Neither its name nor its metadata count, nor whether it was fitted to a base: what it tells is found again
    where only the file is at hand.
    """
    digest = hashlib.sha256()
    for name, change in sorted(adapter.changes.items()):
        _hash(digest, name, change)
    _hash(digest, "tokens", {token: dict(rows) for token, rows in adapter.tokens.items()})
    return digest.hexdigest()


def _path(kind: str, key: str) -> Path:
    return workspace().facts / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(digest: Any, name: str, value: Any) -> None:
    """Add a value to a digest: a tensor with all its numbers, a change or a table with all its parts."""
    import torch

    if isinstance(value, torch.Tensor):
        sizes = list(value.shape)
        # A linear layer and a 1x1 convolution stand for each other.
        while sizes[2:] and sizes[-1] == 1:
            sizes.pop()
        digest.update(f"{name} {value.dtype} {sizes}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return
    parts: Mapping[str, Any] | None = None
    if dataclasses.is_dataclass(value):
        # The shape of a change is that of the base's parameter.
        own = (each.name for each in dataclasses.fields(value) if each.name != "shape")
        parts = {each: getattr(value, each) for each in own}
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, tuple):
        parts = {str(place): part for place, part in enumerate(value)}
    if parts is None:
        digest.update(f"{name} {value!r}\n".encode())
        return
    digest.update(f"{name} {type(value).__name__} {len(parts)}\n".encode())
    for inner in sorted(parts):
        _hash(digest, inner, parts[inner])
