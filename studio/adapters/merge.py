"""Merge several adapters into one, layer by layer: never more than one layer's changes are held in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from studio.adapters.adapter import Adapter, Change, KindOfChange
from studio.adapters.factors import as_lora, in_full, norm, singular_values, truncated
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.loha import LohaChange
from studio.adapters.kinds.lokr import LokrChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.merger import Factors, Layer, Merger, Term
from studio.errors import AdapterError, BaseNeeded, UsageError

if TYPE_CHECKING:
    from studio.adapters.merger import Target

SELF_CONTAINED = (LoraChange, FullChange, SparseChange, LohaChange, LokrChange)
"""Kinds whose changes are the same on every base, and linear in the adapter's weight."""
_KINDS = {LoraChange: "lora", FullChange: "full", SparseChange: "sparse"}


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """One parameter's merged change, and what it was made of.

    Attributes:
        change: What is written.
        ranks: Of the adapters' changes, in their order; None for one without.
        size: Frobenius norm of what the algorithm made.
        error: Frobenius norm of what writing it at its rank leaves out.
        values: All singular values of what the algorithm made, descending; None where not looked for, and for
            biases and norms.
    """

    change: Change
    ranks: tuple[int | None, ...]
    size: float
    error: float
    values: Tensor | None

    @property
    def rank(self) -> int | None:
        """Rank that is written; None for changes without."""
        return self.change.rank if isinstance(self.change, LoraChange) else None


@dataclass(frozen=True, eq=False)
class Merged:
    """An adapter made of several.

    Attributes:
        adapter: Without metadata and tokens.
        layers: How each of its changes came about, by parameter.
    """

    adapter: Adapter
    layers: Mapping[str, MergedLayer]


@torch.no_grad()
def merge_adapters(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    merger: Merger,
    *,
    factors: Mapping[str, Mapping[str, float]] | None = None,
    name: str = "merged",
    parameter: Callable[[str], Tensor] | None = None,
    spectra: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
) -> Merged:
    """Return one adapter in place of several; their tokens are left out.

    Args:
        adapters: By name, fitted to one base.
        weights: By name.
        merger: The algorithm.
        factors: By what an adapter's weight is multiplied, by adapter and parameter; 1 where not given.
        name: Of the merged adapter.
        parameter: From a canonical name to the base's parameter; None where no base is known.
        spectra: Also find the singular values of what is written without them.
        on_layer: Told how many layers are done, and of how many.

    Raises:
        AdapterError: If shapes differ, a change needs the base and there is none, or nothing is left.
        UsageError: If nothing tells the rank to write at.
    """
    weights = {key: weight for key, weight in merger.weights(weights).items() if weight}
    terms: dict[str, list[Term]] = {}
    for key, weight in weights.items():
        own = (factors or {}).get(key, {})
        for target, change in adapters[key].changes.items():
            if factor := own.get(target, 1.0):
                terms.setdefault(target, []).append(Term(key, change, weight * factor))
    largest = max((rank for parts in terms.values() for rank in _ranks(parts) if rank), default=None)
    layers: dict[str, MergedLayer] = {}
    for done, target in enumerate(terms):
        layer = _layer(target, terms[target], merger, largest, parameter)
        made = merger.merge(layer)
        if size := norm(made):
            layers[target] = _written(made, size, layer, merger, spectra)
        if on_layer is not None:
            on_layer(done + 1, len(terms))
    if not layers:
        raise AdapterError(
            f"nothing is left of {', '.join(adapters) or 'no adapters'}: no change, or all cancel each "
            "other. Choose other adapters or weights."
        )
    changes = {target: layer.change for target, layer in layers.items()}
    kind = "+".join(sorted({_KINDS[type(change)] for change in changes.values()}))
    return Merged(Adapter(name, kind, changes), layers)


def _layer(
    name: str,
    terms: Sequence[Term],
    merger: Merger,
    largest: int | None,
    parameter: Callable[[str], Tensor] | None,
) -> Layer:
    """Return the changes of one parameter, made to fit each other, and the rank to write at."""
    shape = tuple((parameter(name) if parameter else _shaped(terms)).shape)
    terms = [Term(term.adapter, _fitted(term, shape, name, terms[0]), term.weight) for term in terms]
    needy = [term for term in terms if not isinstance(term.change, SELF_CONTAINED)]
    if needy and parameter is None:
        raise BaseNeeded(
            f"the change of '{name}' by '{needy[0].adapter}' depends on the base's weight, and the base is "
            "not loaded. Load it, or leave that adapter out."
        )
    base = parameter(name) if needy and parameter else None
    if len(shape) < 2:
        return Layer(name, terms, 0, base)
    rank = merger.rank or max((rank for rank in _ranks(terms) if rank), default=largest)
    if rank is None and not merger.dense and "rank" in merger.reads():
        ways = "rank or dense" if "dense" in merger.reads() else "rank"
        raise UsageError(f"none of the adapters has a rank to merge at. Give {ways}.")
    return Layer(name, terms, min(rank or 0, shape[0], math.prod(shape[1:])), base)


def _shaped(terms: Sequence[Term]) -> Change:
    """Return a change whose shape the others should have: that of a convolution if any is of one."""
    return max((term.change for term in terms), key=lambda change: len(change.shape))


def _fitted(term: Term, shape: tuple[int, ...], name: str, first: Term) -> Change:
    if tuple(term.change.shape) == shape:
        return term.change
    fitted = cast(KindOfChange, term.change).fitted(shape)
    if fitted is None:
        raise AdapterError(
            f"'{term.adapter}' changes '{name}' in the shape {list(term.change.shape)}, {list(shape)} was "
            f"expected as in '{first.adapter}'. Choose adapters for the same base model."
        )
    return fitted


def _ranks(terms: Sequence[Term]) -> tuple[int | None, ...]:
    return tuple(getattr(term.change, "rank", None) for term in terms)


def _written(made: Target, size: float, layer: Layer, merger: Merger, spectra: bool) -> MergedLayer:
    """Return the change to write for what an algorithm made."""
    ranks = _ranks(layer.terms)
    if len(layer.shape) < 2:
        return MergedLayer(_as_change(made, layer.shape), ranks, size, 0.0, None)
    if merger.exact or merger.dense:
        change = _as_change(in_full(made) if merger.dense else made, layer.shape)
        values = None
        if spectra:
            values = singular_values(in_full(made) if isinstance(made, SparseChange) else made)
        return MergedLayer(change, ranks, size, 0.0, values)
    assert not isinstance(made, SparseChange)
    factors, values = truncated(made, layer.rank)
    error = float(values[layer.rank :].square().sum().sqrt())
    return MergedLayer(_as_change(factors, layer.shape), ranks, size, error, values)


def _as_change(made: Target, shape: tuple[int, ...]) -> Change:
    if isinstance(made, Factors):
        return as_lora(made, shape)
    return made if isinstance(made, SparseChange) else FullChange(made.reshape(shape))
