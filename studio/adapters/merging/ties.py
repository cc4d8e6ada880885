"""TIES: trim, elect a sign for each entry, take the mean of those that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.adapters.merger import Layer, Merger
from studio.adapters.merging.magnitude import trimmed
from studio.registry import MERGERS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.merger import Target


@MERGERS.register("ties")
@dataclass(frozen=True)
class Ties(Merger):
    """Each entry gets the mean of those adapters that agree on its sign; small entries have no vote.

        t_i = the largest ``density`` of w_i delta_i
        sign = sgn(sum_i t_i),    delta = mean of t_i over all i with sgn(t_i) = sign

    TIES-Merging, arXiv:2306.01708, Alg. 1. Differs from the paper: entries are compared within a layer, not
    over the whole model, so that one layer at a time is held; and each adapter votes at its weight, in place
    of one factor lambda for all. peft applies it to the factors, whose signs mean nothing alone.
    """

    density: float = 0.2
    rank: int | None = None
    dense: bool = False

    def merge(self, layer: Layer) -> Target:
        """Return the disjoint mean of the trimmed terms."""
        return disjoint_mean([trimmed(layer.delta(term), self.density) for term in layer.terms])


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Return for each entry the mean of the changes that have the sign of the sum there; zeros have none."""
    import torch

    votes = torch.zeros_like(deltas[0])
    for delta in deltas:
        votes += delta
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        agrees = (delta != 0) & ((delta > 0) == (votes >= 0))
        total += delta * agrees
        count += agrees
    return total / count.clamp_min(1)
