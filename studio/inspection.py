"""Say what an adapter file holds from its header and a few integers: no torch is loaded."""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from studio.adapters.header import ELEMENT_BYTES, MAX_RANK, Header, read_header
from studio.errors import OutputError
from studio.registry import FORMATS

_DOWN = re.compile(r"(lora_down|lora_A|lora\.down)(\.default)?\.weight$")
_WIDE = re.compile(rf"attn2[._](processor\.)?to_[kv].*({_DOWN.pattern}|\.diff$)")
_DENSE = re.compile(r"\.(diff|diff_b|w_norm|b_norm)$")
_SHOWN = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.trigger_phrase",
    "studio.role",
    "modelspec.author",
    "modelspec.date",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_output_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_steps",
    "ss_seed",
    "sshs_model_hash",
)
_LONGEST = 100


def describe(path: Path) -> list[str]:
    """Return lines about format, architecture, layers, ranks and metadata of a safetensors file.

    Raises:
        AdapterError: If it cannot be read, is no safetensors file or is damaged.
    """
    header = read_header(path)
    counts = Counter(dtype for dtype, _ in header.tensors.values())
    dtypes = ", ".join(f"{count} x {name}" for name, count in counts.most_common())
    lines = [
        f"file          {path} ({path.stat().st_size / 1e6:.1f} MB)",
        f"tensors       {len(header.tensors)} ({dtypes})",
        f"format        {guess_format(header)}",
        f"architecture  {guess_architecture(header)}",
    ]
    downs = {key: shape for key, (_, shape) in header.tensors.items() if _DOWN.search(key)}
    if downs:
        ranks = Counter(shape[0] for shape in downs.values() if shape)
        parts = Counter(_part(key) for key in downs)
        lines.append(f"layers        {', '.join(f'{count} in the {part}' for part, count in parts.items())}")
        lines.append(
            f"rank          {', '.join(f'{rank} ({count} layers)' for rank, count in sorted(ranks.items()))}"
        )
    lines += [*_dense(header), *_sparse(header, path)]
    known = {key: header.metadata[key] for key in _SHOWN if header.metadata.get(key)}
    lines += [f"  {key:<24} {_plain(value)}" for key, value in known.items()]
    others = len(header.metadata) - len(known)
    if others:
        lines.append(f"  and {others} more metadata entries")
    return lines


def guess_format(header: Header) -> str:
    """Return whose spelling the keys have."""
    keys = header.tensors.keys()
    for name in FORMATS:
        if FORMATS[name].recognises(keys):
            return name
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in keys):
        return "a whole checkpoint: use it as --base"
    return "unknown"


def guess_architecture(header: Header) -> str:
    """Return the base model's family by the metadata, else by names and the prompt embedding's width."""
    said = header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version")
    if said:
        return f"{_plain(said)} (says the metadata)"
    if any(
        key.startswith(("lora_te2_", "text_encoder_2.")) or "add_embedding" in key for key in header.tensors
    ):
        return "SDXL (two text encoders)"
    width = _prompt_width(header.tensors)
    families = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
    if width is None:
        return "unknown"
    return f"{families.get(width, 'unknown')} (prompt embedding of width {width})"


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse before the work what would fail after it.

    Raises:
        OutputError: If the file exists and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' exists. Choose another name or give --overwrite.")


def _dense(header: Header) -> Iterable[str]:
    """Yield a line about changes that are written in full."""
    shapes = [shape for key, (_, shape) in header.tensors.items() if _DENSE.search(key)]
    if shapes:
        yield f"dense         {len(shapes)} parameters, {sum(map(math.prod, shapes)):,} entries"


def _sparse(header: Header, path: Path) -> Iterable[str]:
    """Yield lines about sparse changes: how many entries, of how many, and how these were selected."""
    counts = [shape for key, (_, shape) in header.tensors.items() if key.endswith(".delta")]
    if not counts:
        return
    entries, total = sum(map(math.prod, counts)), sum(map(math.prod, _integers(header, path, ".shape")))
    share = f" of {total:,} ({entries / total:.2%})" if total >= entries else ""
    yield f"sparse        {len(counts)} parameters, {entries:,} entries{share}"
    try:
        rule = json.loads(header.metadata.get("studio.sara", "{}"))
    except (ValueError, RecursionError):
        return
    for name in ("threshold", "quantile"):
        value = rule.get(name) if isinstance(rule, dict) else None
        if isinstance(value, float):
            yield f"{name:<13} {value:g}"


def _integers(header: Header, path: Path, ending: str) -> Iterable[tuple[int, ...]]:
    """Yield the short lists of int64 under the keys with that ending."""
    with path.open("rb") as file:
        place = header.data_start
        for key, (dtype, shape) in header.tensors.items():
            if key.endswith(ending) and dtype == "I64" and len(shape) == 1 and 0 < shape[0] <= MAX_RANK:
                file.seek(place)
                yield struct.unpack(f"<{shape[0]}q", file.read(8 * shape[0]))
            place += math.prod(shape) * ELEMENT_BYTES[dtype]


def _prompt_width(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int | None:
    for key, (_, shape) in tensors.items():
        if _WIDE.search(key) and len(shape) >= 2:
            return shape[1]
    return None


def _part(key: str) -> str:
    if key.startswith(("lora_te2_", "text_encoder_2.")):
        return "second text encoder"
    return "text encoder" if key.startswith(("lora_te", "text_encoder.")) else "UNet"


def _plain(value: str) -> str:
    """Return a stranger's text on one line, short and without control characters."""
    text = "".join(mark if mark.isprintable() else " " for mark in value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(value)} characters)"
