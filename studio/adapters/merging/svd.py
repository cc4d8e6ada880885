"""SVD: the weighted sum at a chosen rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.adapters.merger import Layer, Merger
from studio.registry import MERGERS

if TYPE_CHECKING:
    from studio.adapters.merger import Target


@MERGERS.register("svd")
@dataclass(frozen=True)
class Svd(Merger):
    """Weighted sum at a chosen rank: the nearest product of it.

        delta = U_r S_r V_r^T    of    sum_i w_i delta_i = U S V^T

    Low-rank changes are never multiplied out: QR of the stacked factors, then the SVD of a matrix of the
    side r_1 + r_2 + ...
    """

    rank: int | None = None

    def merge(self, layer: Layer) -> Target:
        """Return the whole sum."""
        from studio.adapters.factors import weighted_sum

        return weighted_sum(layer)
