"""Write an adapter for other tools: in another format, low-rank, dense, or merged into its base."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from studio.adapters.adapter import Adapter, Change
from studio.adapters.bank import WeightBank
from studio.adapters.extraction import extract_low_rank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.origin import check_origin, origin_facts
from studio.adapters.parameters import components_of, find_parameter
from studio.adapters.reference_sara import read_reference
from studio.errors import AdapterError, OutputError, UsageError
from studio.models.base import bars_off, load_base
from studio.models.device import resolve_dtype

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Say = Callable[[str], None]


def convert_file(
    source: Path,
    output: Path,
    *,
    base: str,
    format: str,
    precision: str | None = None,
    rank: int | None = None,
    dense: bool = False,
    any_base: bool = False,
    reference: bool = False,
    overwrite: bool = False,
    say: Say,
) -> Path:
    """Write an adapter file in another format and return its path.

    Args:
        source: The adapter.
        output: Ends in .safetensors.
        base: Model that the adapter is for.
        format: A registered format.
        precision: "fp16", "bf16", "fp32", or None for the format's own choice.
        rank: Approximate every change by one of at most this rank; None keeps them as they are.
        dense: Write every change out in full, for tools that do not know its kind.
        any_base: Take an adapter of another base, and name this one in the file.
        reference: The source is a checkpoint of SaRA's reference program.
        overwrite: Replace the output.
        say: Told what gets lost, and how large the file becomes.

    Raises:
        StudioError: If the base or the adapter cannot be read, or the output cannot be written.
    """
    if dense and rank is not None:
        raise UsageError("dense changes have full rank, rank asks for a low one. Give one of the two.")
    pipe = load_base(base, device="cpu", precision="fp32")
    adapter = _read(source, pipe, any_base=any_base, reference=reference)
    dtype = None if precision is None else resolve_dtype(precision)
    if dense:
        if not any_base:
            check_origin(adapter.metadata, pipe, file=source.name)
        adapter = in_full(adapter, pipe)
        say(f"dense changes hold every entry of {_extent(adapter.changes, dtype)}")
    if rank is not None:
        extraction = extract_low_rank(adapter, pipe, rank=rank)
        for line in extraction.lines():
            say(line)
        adapter = extraction.adapter
    for line in _warnings(adapter, format, dtype):
        say(line)
    origin = origin_facts(pipe) if any_base else None
    return save_adapter(
        adapter, output, format=format, dtype=dtype, metadata=origin, base=pipe, overwrite=overwrite
    )


def merge_into_base(
    source: Path,
    folder: Path,
    *,
    base: str,
    precision: str | None = None,
    any_base: bool = False,
    reference: bool = False,
) -> Path:
    """Write a base model with an adapter merged in at weight 1, as a diffusers folder, whole or not at all.

    Args:
        source: The adapter, of any kind.
        folder: To be made; must not exist.
        base: Model that the adapter is for.
        precision: "fp16", "bf16" or "fp32", the default, in which no small change is rounded away.
        any_base: Take an adapter of another base.
        reference: The source is a checkpoint of SaRA's reference program.

    Raises:
        StudioError: If the base or the adapter cannot be read, or the folder exists or cannot be written.
    """
    if folder.exists():
        raise OutputError(f"'{folder}' exists. Give the name of a folder to be made.")
    pipe = load_base(base, device="cpu", precision="fp32")
    adapter = _read(source, pipe, any_base=any_base, reference=reference)
    if adapter.tokens:
        raise AdapterError(
            f"{source} holds the token '{next(iter(adapter.tokens))}', which is no change of weights, so a "
            "model cannot take it in. Hand the file on beside the model."
        )
    bank = WeightBank(components_of(pipe), adapter.changes)
    bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
    _save(pipe, folder, dtype=resolve_dtype(precision or "fp32"))
    return folder


@torch.no_grad()
def in_full(adapter: Adapter, pipe: "DiffusionPipeline") -> Adapter:
    """Return an adapter that adds at weight 1 what this one does, every entry of it written out.

    Its change is proportional to the weight, also where that of this one is not.

    Args:
        adapter: Of any kind.
        pipe: The base that it is for: what DoRA and OFT add depends on its weights.
    """
    components = components_of(pipe)
    changes = {
        name: FullChange(change.delta(find_parameter(components, name), weight=1.0).cpu())
        for name, change in adapter.changes.items()
    }
    return replace(adapter, kind="full", changes=changes)


def _read(source: Path, pipe: "DiffusionPipeline", *, any_base: bool, reference: bool) -> Adapter:
    return read_reference(source, pipe) if reference else load_adapter(source, base=pipe, any_base=any_base)


def _save(pipe: "DiffusionPipeline", folder: Path, *, dtype: torch.dtype) -> None:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # The models' own `to` warns of parts that must stay fp32, also where there are none.
            torch.nn.Module.to(part, dtype)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with bars_off():
            pipe.save_pretrained(temporary)
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}. Free some space or choose another name."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _warnings(adapter: Adapter, format: str, dtype: torch.dtype | None) -> Iterable[str]:
    """Yield what a person should know before a file with dense or sparse changes is written."""
    direct = [change for change in adapter.changes.values() if isinstance(change, FullChange | SparseChange)]
    if not direct:
        return
    if format == "kohya" and any(isinstance(change, SparseChange) for change in direct):
        yield f"{format} files hold sparse changes in full, every entry of {_extent(adapter.changes, dtype)}"
    if dtype is not None and (lost := _rounding(direct, dtype)) > 1e-3:
        yield f"rounding to {dtype} loses {lost:.1%} of the change; fp32 keeps all"


def _extent(changes: Mapping[str, Change], dtype: torch.dtype | None) -> str:
    """Return in words how much every entry of these changes is."""
    size = sum(math.prod(change.shape) for change in changes.values()) * (dtype or torch.float32).itemsize
    return f"{len(changes)} parameters: about {size / 1e6:.1f} MB"


def _rounding(changes: Iterable[Change], dtype: torch.dtype) -> float:
    """Return the norm that rounding takes from changes, relative to their own."""
    lost = whole = 0.0
    for change in changes:
        assert isinstance(change, FullChange | SparseChange)
        values = change.values.double()
        whole += float(values.square().sum())
        lost += float((values - values.to(dtype).double()).square().sum())
    return math.sqrt(lost / whole) if whole else 0.0
