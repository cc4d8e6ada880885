"""Read and write adapter files of every registered format."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from studio.adapters.adapter import Adapter, Change, ChangeFormat, KindOfChange
from studio.adapters.container import check_target, write_file
from studio.adapters.families import family_of, label, naming_family
from studio.adapters.formats.embedding import TOKEN, Embedding
from studio.adapters.header import Header, read_header
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.metadata import describe
from studio.adapters.names import reference_names
from studio.adapters.origin import check_origin
from studio.adapters.parameters import canonical_names, components_of
from studio.errors import AdapterError, BaseNeeded, UsageError
from studio.models.tokens import check_embeddings
from studio.registry import FORMATS, KINDS

__all__ = ["detect_format", "load_adapter", "read_header", "save_adapter", "usual_dtype"]

Names = Mapping[str, tuple[int, ...]]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_adapter(
    path: str | Path, *, base: Any | None = None, name: str | None = None, any_base: bool = False
) -> Adapter:
    """Read an adapter file and check all of it: every tensor must have a place in the base model.

    Args:
        path: A .safetensors file in any registered format.
        base: The pipeline it is for. Without one, names are resolved by those of SD 1.5, SD 2.1 and SDXL, and
            shapes are not compared with anything.
        name: For messages and weights; by default the file's stem.
        any_base: Take a file of sparse changes also for a base that it was not trained on.

    Raises:
        AdapterError: If the file is damaged, of no known format, incomplete, or made for another base.
    """
    path = Path(path)
    header = read_header(path)
    form = FORMATS[detect_format(header, path.name)]
    if isinstance(form, Embedding):
        return _token(form, header, path, base=base, name=name)
    return _changes(form, header, path, base=base, name=name, any_base=any_base)


def _changes(
    form: ChangeFormat, header: Header, path: Path, *, base: Any | None, name: str | None, any_base: bool
) -> Adapter:
    """Return the adapter in a file of changes."""
    if form.bound_to_base and base is not None and not any_base:
        check_origin(header.metadata, base, file=path.name)
    modules = _modules(form, header, path.name)
    names = _reference(form, header, modules) if base is None else canonical_names(components_of(base))
    table = form.table(names)
    strays = [key for module, parts in modules.items() if module not in table for key in parts.values()]
    if strays:
        raise _misfit(
            path.name, header, None if base is None else names, f"it has no layer for {_listed(strays)}"
        )
    kinds = {module: _kind(parts, path.name) for module, parts in modules.items()}
    changes: dict[str, Change] = {}
    misfits: list[str] = []
    for module, parts in _completed(form, header, modules, _tensors(path), path.name).items():
        for leaf, change in _built(KINDS[kinds[module]], module, parts, path.name).items():
            parameter = f"{table[module]}.{leaf}"
            if parameter in changes:
                raise AdapterError(f"{path.name} changes '{parameter}' under two names. Export it again.")
            wanted = names.get(parameter, ()) if base is not None else change.shape
            fitted = change.fitted(wanted)
            if fitted is None:
                misfits.append(f"{module} ({_size(change.shape)}, the base has {_size(wanted)})")
            else:
                changes[parameter] = fitted
    if misfits:
        raise _misfit(path.name, header, names, f"the shapes of {_listed(misfits)} differ")
    return Adapter(
        name or path.stem, "+".join(sorted(set(kinds.values()))), changes, metadata=header.metadata
    )


def _token(form: Embedding, header: Header, path: Path, *, base: Any | None, name: str | None) -> Adapter:
    """Return the adapter in a file of one token."""
    try:
        token, rows = form.read(_tensors(path), header.metadata, stem=path.stem)
    except ValueError as error:
        raise AdapterError(f"{path.name} is no embedding: {error}. Download or export it again.") from None
    tokens = {token: {component: tensor.float() for component, tensor in rows.items()}}
    if base is not None:
        check_embeddings(base, tokens)
    return Adapter(name or path.stem, "textual-inversion", {}, tokens, header.metadata)


def detect_format(header: Header, file: str) -> str:
    """Return the name of the registered format of a file with that header.

    Raises:
        AdapterError: If no format claims it; shows some of its keys.
    """
    for name in FORMATS.names():
        if FORMATS[name].recognises(header.tensors.keys()):
            return name
    raise AdapterError(
        f"{file} is of no known adapter format ({', '.join(FORMATS.names())}): it holds "
        f"{_listed(list(header.tensors))}. Choose an adapter file, not a whole model."
    )


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str = "kohya",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    base: Any | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter file whole or not at all, and return its path.

    Args:
        adapter: What to write. Its metadata goes along; ``ss_base_model_version`` in it decides how layers
            are named.
        path: Ends in .safetensors; folders on the way are made.
        format: A registered format: "kohya" (other tools), "diffusers" (``load_lora_weights``), "sara" (our
            own, for sparse changes), "embedding" (for one new token).
        dtype: Of the tensors: float16, bfloat16 or float32; by default float16, and float32 for tokens and
            where a change is dense or sparse, since float16 rounds entries below 1e-7 to nothing.
        metadata: Further text entries; they win over the adapter's.
        base: The pipeline it is for; wanted where the changes alone do not tell what a file must say.
        overwrite: Replace the file if there is one.

    Raises:
        UsageError: If the format or dtype is unknown.
        AdapterError: If the format cannot hold the adapter.
        OutputError: If the file exists or cannot be written.
    """
    path, form = Path(path), FORMATS[format]
    dtype = dtype or usual_dtype(adapter)
    if dtype not in _DTYPES:
        raise UsageError(f"adapters are written as float16, bfloat16 or float32, got {dtype}.")
    check_target(path, overwrite=overwrite)
    given = dict(metadata or {})
    _check_savable(adapter, format, metadata={**adapter.metadata, **given})
    shapes = {name: change.shape for name, change in adapter.changes.items()}
    for token, rows in adapter.tokens.items():
        given.setdefault(TOKEN, token)
        shapes |= {f"{component}.{token}": tuple(tensor.shape) for component, tensor in rows.items()}
    family = naming_family(shapes, {**adapter.metadata, **given})
    try:
        names = {} if base is None else canonical_names(components_of(base))
        tensors, alpha = form.write(adapter, family=family, names=names)
    except ValueError as error:
        raise AdapterError(
            f"adapter '{adapter.name}' cannot be written in the format '{format}': {error}."
        ) from None
    ranks = {rank for change in adapter.changes.values() if (rank := getattr(change, "rank", None))}
    entries = describe(
        adapter.metadata, given, title=path.stem, kind=adapter.kind, family=family, ranks=ranks, alpha=alpha
    )
    # Taken out one by one: dense changes fill much memory.
    plain = {key: _plain(tensors.pop(key), dtype, key) for key in list(tensors)}
    write_file(path, plain, entries)
    return path


def _check_savable(adapter: Adapter, format: str, *, metadata: Mapping[str, Any]) -> None:
    """Refuse what no file can hold, or none of this format."""
    if not adapter.changes and not adapter.tokens:
        raise AdapterError(
            f"adapter '{adapter.name}' changes nothing, so there is nothing to write. Train or load it first."
        )
    if adapter.tokens and not isinstance(FORMATS[format], Embedding):
        raise AdapterError(
            f"{format} files cannot hold the new tokens of '{adapter.name}'. Save each by itself in the "
            "format 'embedding'."
        )
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise AdapterError(
            f"metadata must be text, {_listed(wrong)} is not. Convert it, nested values to JSON."
        )


def usual_dtype(adapter: Adapter) -> torch.dtype:
    """Return the type that an adapter is written in unless another is asked for, see :func:`save_adapter`."""
    exact = any(isinstance(change, FullChange | SparseChange) for change in adapter.changes.values())
    return torch.float32 if exact or adapter.tokens else torch.float16


def _modules(form: ChangeFormat, header: Header, file: str) -> dict[str, dict[str, str]]:
    """Return the file's keys by module and part."""
    modules: dict[str, dict[str, str]] = {}
    strays, twice = [], []
    for key in header.tensors:
        place = form.split(key)
        if place is None:
            strays.append(key)
        elif modules.setdefault(place[0], {}).setdefault(place[1], key) != key:
            twice.append(key)
    if strays:
        raise AdapterError(
            f"{file} holds unexpected tensors: {_listed(strays)}. Export it again as a plain LoRA."
        )
    if twice:
        raise AdapterError(
            f"{file} holds the same tensor under two spellings: {_listed(twice)}. Export it again."
        )
    return modules


def _kind(parts: Mapping[str, str], file: str) -> str:
    """Return the kind of change that a module's tensors make up."""
    given = set(parts)
    known = {name: KINDS[name].required | KINDS[name].optional for name in KINDS}
    for name, allowed in known.items():
        # An alpha alone says nothing.
        if KINDS[name].required <= given <= allowed and given != {"alpha"}:
            return name
    # Of kinds that share as many parts the one that most files hold.
    closest = max(known, key=lambda name: (len(known[name] & given), name == "lora"))
    shown = _listed([parts[part] for part in sorted(given - known[closest])] or list(parts.values()))
    if given <= known[closest]:
        missing = ", ".join(sorted(KINDS[closest].required - given))
        raise AdapterError(
            f"{file} is incomplete: beside {shown} it lacks {missing}. Download or export it again."
        )
    raise AdapterError(
        f"{file} holds a kind of change that is not supported: {shown}. Supported: {', '.join(KINDS)}. "
        "Export it again as one of these."
    )


def _reference(form: ChangeFormat, header: Header, modules: Collection[str]) -> Names:
    """Return the names of the first family with a place for every module, beginning with the likeliest."""
    shapes = {key: shape for key, (_, shape) in header.tensors.items()}
    likeliest = naming_family(shapes, header.metadata) or "sd1"
    for family in sorted(("sd1", "sd2", "sdxl"), key=lambda family: family != likeliest):
        names = reference_names(family)
        if form.table(names).keys() >= set(modules):
            return names
    return reference_names(likeliest)


def _misfit(file: str, header: Header, names: Names | None, what: str) -> AdapterError:
    """Return the error for a file that does not fit a base, saying as far as can be told what it is for."""
    if names is None:
        return BaseNeeded(
            f"{file} fits neither SD 1.5, SD 2.1 nor SDXL: {what}. Give the base it was made for."
        )
    made_for = family_of({key: shape for key, (_, shape) in header.tensors.items()})
    base = family_of(names)
    if made_for and made_for != base:
        wanted = label(made_for)
        return AdapterError(
            f"{file} holds {wanted} keys, the base model is {label(base)}. Choose an {wanted} base."
        )
    origin = header.metadata.get("ss_sd_model_name") or header.metadata.get("ss_base_model_version")
    hint = f"; its metadata names {origin[:80]!r}" if origin else ""
    return AdapterError(f"{file} does not fit the base model: {what}. Choose the base it was made for{hint}.")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Copies: the library's tensors are windows into the file, which may change on disk.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}. Download or export it again.") from None
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise AdapterError(
            f"{path.name} holds NaN or infinite values in {_listed(broken)}. Train or export it again."
        )
    return tensors


def _completed(
    form: ChangeFormat,
    header: Header,
    modules: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    file: str,
) -> Mapping[str, Mapping[str, Tensor]]:
    """Return tensors by module and part; what the metadata holds becomes parts like the others."""
    grouped = {
        module: {part: tensors[key] for part, key in parts.items()} for module, parts in modules.items()
    }
    try:
        return form.complete(grouped, header.metadata)
    except ValueError as error:
        raise AdapterError(
            f"{file} cannot be used: {error}. Export it again without that metadata."
        ) from None


def _built(
    kind: type[KindOfChange], module: str, parts: Mapping[str, Tensor], file: str
) -> Mapping[str, KindOfChange]:
    try:
        return kind.from_parts(parts)
    except ValueError as error:
        raise AdapterError(
            f"{file} is damaged at '{module}': {error}. Download or export it again."
        ) from None


def _plain(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Return an own contiguous copy as files want it; scalars stay fp32, they cost nothing, and integers."""
    source = tensor.detach().to("cpu")
    wanted = dtype if source.ndim else torch.float32
    cast = source.to(wanted if source.is_floating_point() else source.dtype).contiguous().clone()
    if not torch.isfinite(cast).all():
        cause = (
            "holds NaN or infinite values"
            if not torch.isfinite(source).all()
            else f"exceeds the range of {dtype}"
        )
        raise AdapterError(
            f"'{key}' {cause}, so it was not written. Train again, or save as bfloat16 or float32."
        )
    return cast


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "no such parameter"
