"""Composition documents: which adapters act how on which base, in a small file of TOML.

    version = 1
    base = "starter"
    method = "klora"

    [options]
    alpha = 1.5

    [[adapters]]
    name = "fox"
    path = "fox.safetensors"
    weight = 0.8
    hash = "5e0f..."

    [modifiers.cache]
    interval = 3

Paths of adapters and masks are relative to the document, and so is a base that begins with a dot. Nothing of
a single picture stands here, such as its prompt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

from studio.adapters.header import tensor_hash
from studio.errors import OutputError, SpecError, UsageError
from studio.flags import read_toml
from studio.png import read_spec
from studio.registry import COMPOSERS
from studio.specs import CompositionSpec, Options, adapter_names, parse_spec
from studio.specs.choice import NONE
from studio.whole_file import whole_file

VERSION = 1
_FIELDS = frozenset(CompositionSpec.model_fields)


def read_composition(path: str | Path, *, home: str | Path | None = None) -> CompositionSpec:
    """Return the composition of a document, or the one that drew a picture (.png).

    Args:
        path: The file.
        home: What relative paths in a document start from; by default its folder.

    Raises:
        UsageError: If it cannot be read, is no composition, or one of a newer version.
        SpecError: Lists every problem of what it says.
    """
    path = Path(path)
    if path.suffix.lower() == ".png":
        return composition_of(read_spec(path))
    document = read_toml(path, "composition")
    version = document.pop("version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UsageError(
            f"'{path}' is no composition: it says no version. Begin it with 'version = {VERSION}', or give "
            "settings of another kind by --config."
        )
    if version > VERSION:
        raise UsageError(
            f"'{path}' is a composition of version {version}, this program reads version {VERSION}. Update "
            "this program, or write the composition again with it."
        )
    try:
        return parse_spec(CompositionSpec, _values(document, Path(home) if home else path.parent))
    except SpecError as error:
        raise SpecError([f"the composition '{path}' is not valid:", *error.problems]) from None


def write_composition(spec: CompositionSpec, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a composition's document, whole or not at all, and return its path.

    Adapters in the document's folder or below are named relative to it. Each has its hash, the expected one
    if there is one.

    Args:
        spec: The composition; of a request for pictures only that much is written.
        path: The file (.toml).
        overwrite: Replace one that is there.

    Raises:
        OutputError: If it exists or cannot be written, or a mask is in memory.
        AdapterError: If an adapter's file is none.
    """
    path = Path(path)
    if path.suffix != ".toml":
        raise OutputError(f"'{path}' is no name for a composition. Choose one that ends in .toml.")
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' exists. Choose another output or give --overwrite.")
    text = tomlkit.dumps(_document(spec, path.parent))
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def composition_of(spec: CompositionSpec) -> CompositionSpec:
    """Return what a request says of its composition, whatever else it says."""
    return CompositionSpec(**{name: getattr(spec, name) for name in _FIELDS})


def _values(document: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Return a specification's values for what a document says."""
    values = dict(document)
    hashes: dict[str, str] = {}
    if isinstance(base := values.get("base"), str) and base.startswith("."):
        values["base"] = base = str(home / base)
    if (expected := values.pop("base_hash", None)) is not None:
        hashes[str(base or CompositionSpec.model_fields["base"].default)] = expected
    uses = values.get("adapters", [])
    if not isinstance(uses, list) or not all(isinstance(use, Mapping) for use in uses):
        raise SpecError(["adapters: each is a table of its own, [[adapters]] with a path."])
    values["adapters"] = found = []
    for use in map(dict, uses):
        expected = use.pop("hash", None)
        if isinstance(use.get("path"), str):
            use["path"] = str(home / use["path"])
            if expected is not None:
                hashes[use["path"]] = expected
        found.append(use)
    if isinstance(options := values.get("options"), Mapping):
        method = values.get("method", CompositionSpec.model_fields["method"].default)
        values["options"] = dict(options) | {
            name: {
                adapter: str(home / mask) if isinstance(mask, str) else mask
                for adapter, mask in options[name].items()
            }
            for name in _mask_options(method) & options.keys()
            if isinstance(options[name], Mapping)
        }
    return {**values, "expected_hashes": hashes}


def _document(spec: CompositionSpec, home: Path) -> dict[str, Any]:
    """Return what a document in the folder ``home`` says of a composition."""
    options = _said(spec.options)
    for name in _mask_options(spec.method):
        options[name] = {
            adapter: _portable(_mask_file(adapter, mask), home)
            for adapter, mask in getattr(spec.options, name).items()
        }
    modifiers = {name: _said(given) for name, given in spec.modifiers.items()}
    base_hash = spec.expected_hashes.get(spec.base)
    return {
        "version": VERSION,
        "base": _base(spec.base, home),
        **({"base_hash": base_hash} if base_hash else {}),
        "method": spec.method,
        **({"options": options} if options else {}),
        "adapters": [
            {
                "name": name,
                "path": _portable(use.path, home),
                "weight": use.weight,
                **({"hash": digest} if (digest := _hash(spec, use.path)) else {}),
            }
            for name, use in zip(adapter_names(spec.adapters), spec.adapters, strict=True)
        ],
        **({"modifiers": modifiers} if modifiers else {}),
    }


def _said(options: Options) -> dict[str, Any]:
    """Return options as TOML can say them: it has no word for None, which a default does not need."""
    fields = type(options).model_fields
    return {
        name: NONE if value is None else value
        for name, value in options.model_dump(mode="json").items()
        if value is not None or fields[name].default is not None
    }


def _mask_options(method: Any) -> set[str]:
    """Return the names of a method's options that hold masks by adapter."""
    if method not in COMPOSERS.names():
        return set()
    properties = COMPOSERS[method].Options.model_json_schema().get("properties", {})
    return {
        name
        for name, field in properties.items()
        if isinstance(entries := field.get("additionalProperties"), Mapping)
        and entries.get("format") == "mask"
    }


def _mask_file(adapter: str, mask: Any) -> Path:
    if not isinstance(mask, Path):
        raise OutputError(
            f"the mask of '{adapter}' is in memory, which a composition cannot hold. Save it as a picture "
            "and give its path."
        )
    return mask


def _base(base: str, home: Path) -> str:
    if base == CompositionSpec.model_fields["base"].default or not Path(base).exists():
        return base
    path = _portable(Path(base), home)
    return path if Path(path).is_absolute() else f"./{path}"


def _hash(spec: CompositionSpec, path: Path) -> str | None:
    expected = spec.expected_hashes.get(str(path))
    return expected or (tensor_hash(path) if path.is_file() else None)


def _portable(path: Path, home: Path) -> str:
    """Return a path relative to the document's folder if it lies there, else the absolute one."""
    full, folder = path.resolve(), home.resolve()
    inside = full.is_relative_to(folder)
    return (full.relative_to(folder) if inside else full).as_posix()
