"""Read the header of a safetensors file without torch, and trust nothing in it.

A safetensors file is 8 bytes of header length, little endian, a JSON header and the tensors' bytes without
gaps. The library accepts duplicate keys (the last wins), keys that look like paths and headers of 100 MB;
files come from strangers, so this reader refuses those too, and says in plain words what a file is when it is
something else.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from studio.errors import AdapterError
from studio.registry import nearest

MAX_HEADER_BYTES = 32 * 2**20
MAX_METADATA_BYTES = 16 * 2**20
MAX_RANK = 8
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_KEY = re.compile(r"[\w.<>:+ -]{1,512}")
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds.

    Attributes:
        tensors: Dtype in the file's spelling ("F16") and shape by key, in the file's order of bytes.
        metadata: The file's own text entries.
        data_start: Offset of the first tensor byte in the file.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | Path) -> Header:
    """Return the checked header of a safetensors file; no tensor is read.

    Raises:
        AdapterError: If there is no such file, or it is not a whole and plain safetensors file.
    """
    path = Path(path)
    _check_place(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            text, data_start = _header_text(file, path, size)
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    header = _parse(text, path)
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a JSON {type(header).__name__} where an object was expected")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    if not header:
        raise AdapterError(f"{path.name} holds no tensors. Choose another file.")
    spans = {key: _span(key, entry, path) for key, entry in header.items()}
    order = sorted(spans, key=lambda key: spans[key][2:])
    end = 0
    for key in order:
        if spans[key][2] != end:
            raise _damaged(path, f"the bytes of '{_shown(key)}' overlap others or leave a gap")
        end = spans[key][3]
    if data_start + end > size:
        raise _truncated(path, data_start + end, size)
    if data_start + end < size:
        raise _damaged(path, f"{size - data_start - end} bytes follow the last tensor")
    return Header({key: spans[key][:2] for key in order}, metadata, data_start)


def tensor_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's tensors, by which other programs look adapters up.

    Raises:
        AdapterError: If it is no adapter file.
    """
    return file_hash(path, start=read_header(path).data_start)


def file_hash(path: str | Path, *, start: int = 0) -> str:
    """Return the SHA-256 of a file from an offset on, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_place(path: Path) -> None:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.glob("*.safetensors"))
        there = f" In it: {', '.join(inside[:5])}." if inside else ""
        raise AdapterError(f"{path} is a folder, an adapter is one .safetensors file.{there}")
    if path.exists():
        return
    siblings = [entry.name for entry in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
    raise AdapterError(
        f"{path} does not exist.{nearest(path.name, siblings)} Give the path of a .safetensors file."
    )


def _header_text(file: BinaryIO, path: Path, size: int) -> tuple[bytes, int]:
    start = file.read(64)
    _refuse_others(start, path)
    if len(start) < 8:
        raise _truncated(path, 8, size)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"it claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if 8 + length > size:
        raise _truncated(path, 8 + length, size)
    file.seek(8)
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _damaged(path, "its header does not begin with '{'")
    return text, 8 + length


def _refuse_others(start: bytes, path: Path) -> None:
    """Name the things that are often mistaken for an adapter file."""
    # Every pickle of protocol 2 and up begins with 0x80 and its number; torch wraps pickles in zip archives.
    pickled = re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start) or path.suffix.lower() in _PICKLE_SUFFIXES
    if pickled and start[8:9] != b"{":
        raise AdapterError(
            f"{path.name} is a pickle, which can run code when it is opened, so it is refused. Get the "
            ".safetensors version, or convert it: torch.load(file, weights_only=True), then "
            "safetensors.torch.save_file."
        )
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(
            f"{path.name} is only a Git LFS pointer. Fetch the file itself with 'git lfs pull'."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise AdapterError(
            f"{path.name} is a web page, saved instead of the file. Download it again, signed in if need be."
        )


def _parse(text: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _damaged(path, f"its header names '{_shown(twice)}' twice")
        return entries

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not valid JSON in UTF-8") from None


def _metadata(entries: Any, path: Path) -> dict[str, str]:
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise _damaged(path, "its metadata holds something other than text")
    size = sum(len(key) + len(value) for key, value in entries.items())
    if size > MAX_METADATA_BYTES:
        raise _damaged(path, f"it has {size} characters of metadata, at most {MAX_METADATA_BYTES} are read")
    return entries


def _span(key: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first and last offset of one checked entry."""
    shown = _shown(key)
    if not _KEY.fullmatch(key):
        raise _damaged(path, f"a tensor is called '{shown}', which is no name of a layer")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's entry for '{shown}' is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        known = ", ".join(ELEMENT_BYTES)
        raise AdapterError(
            f"{path.name}: '{shown}' is of type {_shown(str(dtype))}; adapters hold {known}. Save it as F16."
        )
    if not _naturals(shape) or len(shape) > MAX_RANK or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the header's entry for '{shown}' is malformed")
    if offsets[1] - offsets[0] != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise _damaged(path, f"'{shown}' has another number of bytes than its shape and type need")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _shown(text: str) -> str:
    """Return text of a stranger in a form that fits one line of a message."""
    plain = text
    if not text.isprintable():
        plain = "".join(character if character.isprintable() else "?" for character in text)
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _damaged(path: Path, what: str) -> AdapterError:
    return AdapterError(f"{path.name} is not a usable safetensors file: {what}. Download or export it again.")


def _truncated(path: Path, wanted: int, size: int) -> AdapterError:
    return AdapterError(
        f"{path.name} is cut short: it has {size} bytes of at least {wanted}. Download or copy it again."
    )


def encode_header(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a safetensors file; equal input gives equal bytes, whatever the metadata's
    order.

    Args:
        tensors: The tensors' entries as a parsed header has them (dtype, shape, data_offsets).
        metadata: Text entries.
    """
    entries = {"__metadata__": dict(sorted(metadata.items())), **tensors} if metadata else dict(tensors)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
