"""What is written of an adapter that was made of others: its file, its tokens' files, what they say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from studio.adapters.adapter import Adapter
from studio.adapters.container import check_target
from studio.adapters.files import save_adapter
from studio.adapters.header import tensor_hash
from studio.adapters.origin import origin_facts
from studio.specs import AdapterUse, Event, OnEvent

# What a file says of its base; kept where no adapter says otherwise.
_OF_BASE = ("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "modelspec.prediction_type",
            "studio.base", "studio.base.fp16", "studio.base.bf16", "studio.base.fp16.bf16")  # fmt: skip
_TRIGGER = "modelspec.trigger_phrase"


def inherited_facts(adapters: Iterable[Adapter], pipe: Any, *, tell: OnEvent) -> dict[str, str]:
    """Return the metadata that goes on in a file made of these adapters: the base and the trigger words.

    Args:
        adapters: Those with changes.
        pipe: Their base, or None where it is not known.
        tell: Told where their files name different bases.
    """
    adapters = list(adapters)
    facts = {}
    for key in _OF_BASE:
        said = {adapter.metadata[key] for adapter in adapters if key in adapter.metadata}
        if len(said) == 1:
            facts[key] = said.pop()
        elif key == "studio.base" and said and pipe is None:
            tell(Event(kind="message", message="the adapters were trained on different base models"))
    if pipe is not None:
        facts |= origin_facts(pipe)
    triggers = [adapter.metadata[_TRIGGER] for adapter in adapters if adapter.metadata.get(_TRIGGER)]
    if triggers:
        facts[_TRIGGER] = ", ".join(dict.fromkeys(triggers))
    return facts


def described(uses: Mapping[str, AdapterUse]) -> list[dict[str, Any]]:
    """Return what metadata say of the adapters that a file was made of.

    Raises:
        AdapterError: If one's file cannot be read.
    """
    return [
        {"name": name, "file": use.path.name, "sha256": tensor_hash(use.path), "weight": use.weight}
        for name, use in uses.items()
    ]


def write_with_tokens(
    adapter: Adapter, output: Path, *, format: str, dtype: torch.dtype, pipe: Any, overwrite: bool
) -> tuple[Path, ...]:
    """Write an adapter's file and one for each of its tokens: only a file of its own can hold a token.

    Raises:
        AdapterError: If the format cannot hold the changes.
        OutputError: If a file exists or cannot be written.
    """
    paths = [output]
    files: Sequence[tuple[str, Path]] = [
        (token, output.with_name(f"{output.stem}-{_plain(token)}.safetensors")) for token in adapter.tokens
    ]
    for _, path in files:
        check_target(path, overwrite=overwrite)
    save_adapter(
        replace(adapter, tokens={}), output, format=format, dtype=dtype, base=pipe, overwrite=overwrite
    )
    for token, path in files:
        part = Adapter(
            path.stem, "textual-inversion", {}, {token: adapter.tokens[token]}, dict(adapter.metadata)
        )
        paths.append(save_adapter(part, path, format="embedding", base=pipe, overwrite=overwrite))
    return tuple(paths)


def _plain(token: str) -> str:
    """Return what of a token may stand in a file's name."""
    return "".join(mark for mark in token if mark.isalnum() or mark in "-_") or "token"
