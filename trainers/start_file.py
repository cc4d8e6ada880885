"""Layers that start from an adapter's file: whether it fits them, and its matrices in their places."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.dora import DoraChange
from studio.adapters.kinds.lora import LoraChange
from studio.errors import TrainingError
from studio.trainers.layer_method import PEFT_NAME
from studio.trainers.targets import parts_of, within

SHOWN = 3
"""How many layers a message names."""
_FIT = "Choose targets, exclude and train_text_encoder so that the run trains the layers of the file."
_METHODS = {"lora": "lora", "dora": "dora"}
"""Method by the kind of adapter that it goes on from."""


def check_kind(adapter: Adapter, kind: str) -> None:
    """Check that an adapter is of the kind that a method makes.

    Raises:
        TrainingError: If it is of another.
    """
    if adapter.kind == kind:
        return
    other = f"Set method to {_METHODS[adapter.kind]}" if adapter.kind in _METHODS else "Choose another file"
    raise TrainingError(
        f"start_from: {adapter.name}.safetensors is of the kind '{adapter.kind}', this run's "
        f"method makes '{kind}'. {other}, or leave start_from out."
    )


def check_layers(adapter: Adapter, ranks: Mapping[str, int]) -> None:
    """Check that an adapter is of the layers that are trained, and of their ranks.

    Args:
        adapter: Of low rank.
        ranks: Of the layers that are trained, by the names of their weights.

    Raises:
        TrainingError: If it is not; names what differs and what to set.
    """
    file = f"start_from: {adapter.name}.safetensors"
    if lacking := [name for name in ranks if name not in adapter.changes]:
        raise TrainingError(f"{file} lacks {_named(lacking)} of the {len(ranks)} that are trained. {_FIT}")
    if strays := [name for name in adapter.changes if name not in ranks]:
        raise TrainingError(f"{file} changes {_named(strays)} that the run does not train. {_FIT}")
    own = {name: _low_rank(change).rank for name, change in adapter.changes.items()}
    if differing := [name for name, rank in ranks.items() if own[name] != rank]:
        found, wanted = (
            ", ".join(map(str, sorted({each[name] for name in differing}))) for each in (own, ranks)
        )
        usual, blocks = _settings(own)
        listed = ", ".join(f"{part} = {rank}" for part, rank in blocks.items())
        also = f"block_ranks to {listed}" if blocks else "leave block_ranks out"
        setting = f"Set rank to {usual}{f' and {also}' if blocks or len(set(ranks.values())) > 1 else ''}."
        raise TrainingError(
            f"{file} has rank {found} at {_named(differing)}, the run has rank {wanted}. {setting}"
        )


@torch.no_grad()
def set_product(layer: Any, change: LoraChange) -> None:
    """Give one of peft's low-rank layers the matrices of a change that fits it.

    The change is kept to rounding whatever alpha the run has: where their scales differ, the up matrix takes
    the factor.
    """
    factor = change.alpha / change.rank / layer.scaling[PEFT_NAME]
    layer.lora_A[PEFT_NAME].weight.copy_(change.down)
    layer.lora_B[PEFT_NAME].weight.copy_(change.up.float() * factor)


@torch.no_grad()
def set_lengths(layer: Any, change: DoraChange) -> None:
    """Give one of peft's DoRA layers the lengths of a change that fits it.

    Raises:
        TrainingError: If they are lengths of columns.
    """
    if change.per_input:
        raise TrainingError(
            "start_from: the file has DoRA's lengths for inputs, as older versions of LyCORIS wrote; dora "
            "learns one for each output. Choose another file."
        )
    lengths = layer.lora_magnitude_vector[PEFT_NAME].weight
    lengths.copy_(change.magnitude.view_as(lengths))


def _low_rank(change: Any) -> LoraChange:
    found = change.direction if isinstance(change, DoraChange) else change
    assert isinstance(found, LoraChange)
    return found


def _settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the rank of most layers, and that of the others by parts of names, as block_ranks takes them."""
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    usual = Counter(modules.values()).most_common(1)[0][0]
    found: dict[str, int] = {}
    for module, rank in modules.items():
        if rank == usual or any(within(part, module) for part in found):
            continue
        # The shortest part that only layers of this rank have; in the end the whole name is one.
        for length in range(1, module.count(".") + 2):
            parts = [part for part in parts_of([module], length=length) if not part[0].isdigit()]
            ranks_of = {part: {modules[each] for each in modules if within(part, each)} for part in parts}
            if own := [part for part in parts if ranks_of[part] == {rank}]:
                found[own[0]] = rank
                break
    return usual, found


def _named(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{more})"
