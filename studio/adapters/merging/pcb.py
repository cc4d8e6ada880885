"""PCB: entries compete within an adapter and between adapters; the best are kept and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.adapters.merger import Layer, Merger
from studio.adapters.merging.magnitude import keep_largest
from studio.registry import MERGERS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.merger import Target


@MERGERS.register("pcb")
@dataclass(frozen=True)
class Pcb(Merger):
    """Mean of the entries that matter most in their adapter and go with those of the others.

        d_i = w_i delta_i,    n = number of adapters
        intra_i = softmax(n Norm(d_i * d_i)),    inter_i = sum_j softmax(Norm(d_i * d_j))
        b_i = the largest ``density`` of intra_i * inter_i,    delta = sum_i b_i * d_i / sum_i b_i

    PCB-Merging, arXiv:2410.02396, Sec. 3. Norm scales to 0 ... 1, as in the authors' program. Differs from
    the paper: entries are compared within a layer, not over the whole model, and weights are given instead of
    searched for by evolution. Differs from the authors' program: that takes exp(n |d_i|^2) tanh(d_i sum_j
    d_j), which depends on the unit of the weights, and cuts off outliers first.
    """

    density: float = 0.2
    rank: int | None = None
    dense: bool = False

    def merge(self, layer: Layer) -> Target:
        """Return the weighted mean of the winners, zero where no adapter has one."""
        import torch

        deltas = layer.deltas()
        total, mass = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta in deltas:
            scores = _scores(delta, deltas)
            share = keep_largest(scores, scores, self.density)
            total += share * delta
            mass += share
        return torch.where(mass > 0, total / mass, 0.0)


def _scores(delta: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """Return how well one adapter's entries compete; their mean, not their sum, is about 1."""
    import torch

    inter = torch.zeros_like(delta)
    for other in deltas:
        inter += _softmax(_normalised(delta * other))
    return _softmax(len(deltas) * _normalised(delta.square())) * inter


def _normalised(values: Tensor) -> Tensor:
    """Return the values moved and scaled to 0 ... 1; zeros if all are the same."""
    import torch

    low, high = torch.aminmax(values)
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _softmax(values: Tensor) -> Tensor:
    """Return the softmax over all entries, times their number: fp32 keeps its digits in large layers."""
    powers = values.exp()
    return powers / powers.mean()
