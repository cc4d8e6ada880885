"""How large an adapter's changes of layers are: the sums that K-LoRA compares, measured once and kept."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studio.adapters.adapter import Adapter, Change
from studio.adapters.parameters import components_of, find_parameter
from studio.composition import facts
from studio.errors import BaseNeeded, CompositionError
from studio.models.fingerprint import fingerprint

_KIND = "layer-sums"
# Entries of a change that exist at a time: 16 MiB in fp32, and about as much again while the largest are
# sought. A change without low rank is formed whole, 4 bytes for each entry of the layer.
_BLOCK = 2**22
_SAMPLED = 16


@dataclass(frozen=True)
class LayerSums:
    """Sums over the absolute entries of an adapter's change of one layer.

    Attributes:
        total: Of all entries.
        largest: Of the K largest entries by K; of all where K exceeds their number.
    """

    total: float
    largest: Mapping[int, float]


def layers_of(adapter: Adapter) -> dict[str, list[str]]:
    """Return the denoiser's layers (modules) that the adapter changes, with the changed parameters."""
    layers: dict[str, list[str]] = {}
    for name in adapter.changes:
        if name.startswith("unet."):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


@torch.no_grad()
def layer_sums(
    adapter: Adapter,
    counts: Mapping[str, Collection[int]],
    *,
    weight: float,
    pipe: Any = None,
    base: str | None = None,
) -> dict[str, LayerSums]:
    """Return the sums of an adapter's effective changes, ``alpha / rank`` and weight included.

    What was measured of the same adapter before, in this process or another, is not measured again: a
    low-rank change is the same on every base and linear in its weight, others are kept for each base and
    weight.

    Args:
        adapter: What to measure.
        counts: The values of K that are wanted, by layer.
        weight: Of the adapter.
        pipe: The base; needed where a change has no low rank, as it may depend on the base's weights.
        base: Fingerprint of the base, where it is not at hand: under this is found what was measured on it.

    Raises:
        BaseNeeded: If the base is needed and not given.
        CompositionError: If a change holds NaN or infinity.
    """
    layers = layers_of(adapter)
    changes = {layer: {name: adapter.changes[name] for name in layers[layer]} for layer in counts}
    portable = all(change.low_rank() is not None for group in changes.values() for change in group.values())
    if not portable and pipe is not None:
        base = fingerprint(pipe)
    at, key = (1.0, "") if portable else (weight, f" {base} {weight!r}")
    key = facts.content_hash(adapter) + key
    known = facts.get(_KIND, key) or {}
    wanted = {layer: set(map(str, ks)) - known.get(layer, {}).keys() for layer, ks in counts.items()}
    missing = {layer: sorted(map(int, ks)) for layer, ks in wanted.items() if ks}
    if missing and not portable and pipe is None:
        raise BaseNeeded(
            f"'{adapter.name}' ({adapter.kind}) has changes that are measured once on the base's weights; "
            "that was not done yet at this weight, and no base was given. Compose on a pipeline, which "
            "remembers what it measures, or take adapters of the kind 'lora'."
        )
    if missing:
        for layer, ks in missing.items():
            found = _measured(_blocks(changes[layer], weight=at, pipe=pipe), ks)
            if not all(map(math.isfinite, found.values())):
                raise CompositionError(
                    f"'{adapter.name}' holds NaN or infinity in '{layer}'. Train or export it again."
                )
            known[layer] = {**known.get(layer, {}), **found}
        facts.put(_KIND, key, known)
    factor = abs(weight) if portable else 1.0
    return {
        layer: LayerSums(factor * known[layer]["all"], {k: factor * known[layer][str(k)] for k in ks})
        for layer, ks in counts.items()
    }


def _measured(blocks: Iterator[Tensor], counts: Sequence[int]) -> dict[str, float]:
    """Return the sum over absolute entries as "all", and those of the K largest as "K"."""
    total, most = 0.0, max(counts)
    largest: Tensor | None = None
    for block in blocks:
        flat = block.abs().flatten()
        total += float(flat.sum())
        best = _largest(flat, most)
        largest = best if largest is None else _largest(torch.cat([largest, best]), most)
    assert largest is not None
    descending = largest.sort(descending=True).values
    return {"all": total, **{str(k): float(descending[:k].sum()) for k in counts}}


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest of the values ``[n]``, or all if there are not so many."""
    if len(values) > 2 * _SAMPLED * count:
        # No value below the sample's last one can be among them: comparing is far cheaper than sorting.
        least = values[::_SAMPLED].topk(count).values[-1]
        values = values[values >= least]
    return values if len(values) <= count else values.topk(count, sorted=False).values


def _blocks(changes: Mapping[str, Change], *, weight: float, pipe: Any) -> Iterator[Tensor]:
    """Yield the entries of a layer's changes, fp32, a block of rows at a time."""
    components = {} if pipe is None else components_of(pipe)
    for name, change in changes.items():
        factors = change.low_rank()
        if factors is None:
            yield from (
                change.delta(find_parameter(components, name).detach(), weight=weight).flatten().split(_BLOCK)
            )
            continue
        device = next(components["unet"].parameters()).device if components else factors[0].device
        if device.type == "meta":
            device = torch.device("cpu")
        down, up = (factor.to(device).float().flatten(1) for factor in factors)
        for rows in up.split(max(1, _BLOCK // down.shape[1])):
            yield weight * (rows @ down)
