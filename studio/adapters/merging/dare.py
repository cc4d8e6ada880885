"""DARE: drop entries at random, rescale the rest, then sum or elect signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from studio.adapters.merger import Layer, Merger, Term
from studio.adapters.merging.ties import disjoint_mean
from studio.registry import MERGERS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.merger import Target


@MERGERS.register("dare")
@dataclass(frozen=True)
class Dare(Merger):
    """Each adapter keeps random entries, scaled up to make up for the others: fewer of them collide.

        t_i = m_i * w_i delta_i / density,    m_i ~ Bernoulli(density)
        delta = sum_i t_i  (linear),  or the disjoint mean of TIES  (ties)

    DARE, arXiv:2311.03099, Eq. 1 to 3. The dropped entries make the change one of full rank: at a low rank
    much of what was drawn is cut away again, so write it dense or at a high density.
    """

    density: float = 0.5
    combine: Literal["linear", "ties"] = "linear"
    merge_seed: int = 0
    rank: int | None = None
    dense: bool = False

    def merge(self, layer: Layer) -> Target:
        """Return the combined terms."""
        if self.combine == "ties":
            return disjoint_mean([self._dropped(layer, term) for term in layer.terms])
        total = self._dropped(layer, layer.terms[0])
        for term in layer.terms[1:]:
            total += self._dropped(layer, term)
        return total

    def _dropped(self, layer: Layer, term: Term) -> Tensor:
        import torch

        delta = layer.delta(term)
        draws = torch.rand(delta.shape, generator=layer.generator(self.merge_seed, term))
        return delta * (draws < self.density) / self.density
