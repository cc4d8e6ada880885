"""Merge adapter files into one, with a report before anything is written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.container import check_target
from studio.adapters.families import check_one_family
from studio.adapters.files import load_adapter, usual_dtype
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.merge import merge_adapters
from studio.adapters.parameters import components_of, find_parameter
from studio.composition.fit import tokens_of
from studio.errors import AdapterError
from studio.inspection import refuse_existing
from studio.merging.outputs import described, inherited_facts, write_with_tokens
from studio.merging.picture import draw_curves
from studio.merging.report import MergeReport, report_of
from studio.models.base import load_base
from studio.models.device import resolve_dtype
from studio.specs import AdapterUse, Event, MergeSpec, OnEvent, adapter_names
from studio.specs.events import silent
from studio.whole_file import whole_file

# Without a base, the kernel of other kinds is not known, or their changes depend on its weights.
_WITHOUT_BASE = (LoraChange, FullChange, SparseChange)


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        adapter: The merged adapter, with tokens and metadata.
        report: What it is made of, what writing it loses, how large it is.
        paths: The file and one for each new token beside it; empty where nothing was to be written.
    """

    adapter: Adapter
    report: MergeReport
    paths: tuple[Path, ...]


def merge(spec: MergeSpec, *, on_event: OnEvent | None = None) -> MergeResult:
    """Make one ordinary adapter of several; without an output only say what it would be.

    Args:
        spec: The request.
        on_event: Told of progress in layers, of what a person should know, and of each file.

    Raises:
        AdapterError: If an adapter cannot be read, does not fit the others or the base, or needs a base.
        UsageError: If nothing tells the rank to write at.
        CompositionError: If two adapters bring the same token.
        OutputError: If a file exists or cannot be written.
    """
    tell = on_event or silent
    _check_outputs(spec)
    pipe = load_base(spec.base, device="cpu", precision="fp32", on_event=tell) if spec.base else None
    names = adapter_names(spec.adapters)
    uses = dict(zip(names, spec.adapters, strict=True))
    adapters = {
        name: load_adapter(use.path, base=pipe, name=name, any_base=spec.any_base)
        for name, use in uses.items()
    }
    weights = {name: use.weight for name, use in uses.items()}
    tokens = tokens_of(adapters, weights)
    layered = {name: adapter for name, adapter in adapters.items() if adapter.changes}
    if pipe is None:
        check_without_base(layered, remedy="Give --base.")
    merged = merge_adapters(
        layered,
        {name: weights[name] for name in layered},
        spec.merger(),
        name=spec.output.stem if spec.output else "merged",
        parameter=None if pipe is None else _reader(pipe),
        spectra=spec.preview is not None or spec.output is None,
        on_layer=lambda done, total: tell(Event(kind="progress", step=done, total=total)),
    )
    facts = _facts(spec, uses, layered.values(), pipe, tell)
    adapter = replace(merged.adapter, tokens=tokens, metadata=facts)
    dtype = usual_dtype(merged.adapter) if spec.precision == "auto" else resolve_dtype(spec.precision)
    report = report_of(merged, dtype=dtype, format=spec.format)
    if spec.preview is not None:
        _draw(report, spec.preview)
        tell(Event(kind="picture", path=spec.preview))
    paths: tuple[Path, ...] = ()
    if spec.output is not None:
        paths = write_with_tokens(
            adapter, spec.output, format=spec.format, dtype=dtype, pipe=pipe, overwrite=spec.overwrite
        )
    for path in paths:
        tell(Event(kind="saved", path=path, message=f"wrote {path}"))
    tell(Event(kind="finished", path=spec.output, values={"error": report.whole.error}))
    return MergeResult(adapter, report, paths)


def _check_outputs(spec: MergeSpec) -> None:
    """Refuse before the work what would fail after it."""
    if spec.output is not None:
        check_target(spec.output, overwrite=spec.overwrite)
    if spec.preview is not None:
        refuse_existing(spec.preview, overwrite=spec.overwrite)


def _reader(pipe: Any) -> Callable[[str], Tensor]:
    components = components_of(pipe)
    return lambda name: find_parameter(components, name).detach()


def check_without_base(adapters: Mapping[str, Adapter], *, remedy: str) -> None:
    """Raise AdapterError for what only a base could tell; ``remedy`` is the way out."""
    for name, adapter in adapters.items():
        for parameter, change in adapter.changes.items():
            if not isinstance(change, _WITHOUT_BASE):
                raise AdapterError(
                    f"'{name}' is of the kind {adapter.kind}, whose change of '{parameter}' cannot be told "
                    f"without the base model. {remedy}"
                )
    check_one_family(
        {
            name: {key: tuple(change.shape) for key, change in adapter.changes.items()}
            for name, adapter in adapters.items()
        }
    )


def _facts(
    spec: MergeSpec, uses: Mapping[str, AdapterUse], adapters: Any, pipe: Any, tell: OnEvent
) -> dict[str, str]:
    """Return the metadata of the merged file: the base, trigger words, and what was merged how."""
    recipe = {"how": spec.how, "options": spec.settings(), "adapters": described(uses)}
    return inherited_facts(adapters, pipe, tell=tell) | {"studio.merge": json.dumps(recipe, sort_keys=True)}


def _draw(report: MergeReport, path: Path) -> None:
    with whole_file(path) as unfinished:
        draw_curves(report).save(unfinished, format="PNG")
