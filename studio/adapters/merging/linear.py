"""Linear: the weighted sum, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.merger import Layer, Merger
from studio.registry import MERGERS

if TYPE_CHECKING:
    from studio.adapters.merger import Target


@MERGERS.register("linear")
@dataclass(frozen=True)
class Linear(Merger):
    """Weighted sum, exact: ranks add up.

        delta = sum_i w_i delta_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...],    s = alpha / rank

    What peft calls "cat"; peft's "linear" averages factors, which is not the sum of the changes. Sparse
    changes stay sparse; where one adapter's change has no low rank, the sum is dense.
    """

    exact: ClassVar[bool] = True

    def merge(self, layer: Layer) -> Target:
        """Return the sum, as a product or sparse where all terms are."""
        from studio.adapters.factors import sparse_sum, weighted_sum

        return sparse_sum(layer) or weighted_sum(layer)
