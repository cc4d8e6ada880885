"""Magnitude: small entries are dropped, the rest is summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.adapters.merger import Layer, Merger
from studio.registry import MERGERS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.merger import Target


@MERGERS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Merger):
    """Sum of each adapter's largest entries; the small ones, mostly noise, are dropped.

        delta = sum_i m_i * w_i delta_i,    m_i = the largest ``density`` of |delta_i|

    Per layer. peft prunes the factors instead, entry by entry, which prunes other entries of the change.
    """

    density: float = 0.5
    rank: int | None = None
    dense: bool = False

    def merge(self, layer: Layer) -> Target:
        """Return the sum of the trimmed terms."""
        total = trimmed(layer.delta(layer.terms[0]), self.density)
        for term in layer.terms[1:]:
            total += trimmed(layer.delta(term), self.density)
        return total


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return the change with only its largest entries, at least one: that share of them, the rest zeros."""
    return keep_largest(delta, delta.abs(), density)


def keep_largest(values: Tensor, scores: Tensor, density: float) -> Tensor:
    """Return the values where the scores are the largest, at least one, and zeros elsewhere.

    Args:
        values: Of any shape.
        scores: Of the same shape.
        density: Share of entries to keep, above 0 and at most 1.
    """
    kept = max(1, int(density * values.numel()))
    places = scores.flatten().topk(kept, sorted=False).indices
    sparse = values.new_zeros(values.numel())
    sparse[places] = values.flatten()[places]
    return sparse.reshape(values.shape)
