"""Soup: the mean of the models that the adapters make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from studio.adapters.merging.linear import Linear
from studio.errors import UsageError
from studio.registry import MERGERS


@MERGERS.register("soup")
@dataclass(frozen=True)
class Soup(Linear):
    """Mean of the models that the adapters make, exact: for runs on the same data.

        delta = sum_i w_i delta_i / sum_i w_i

    An adapter that leaves a layer alone counts there as no change. The uniform soup of Model soups,
    arXiv:2203.05482, Sec. 2, at equal weights. Differs from the paper: weights may differ, and nothing is
    measured to choose among the models (its greedy soup).
    """

    def weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights divided by their sum.

        Raises:
            UsageError: If they sum to 0.
        """
        total = sum(weights.values())
        if not total:
            raise UsageError("soup divides by the sum of the weights, which is 0. Choose other weights.")
        return {name: weight / total for name, weight in weights.items()}
