"""Which entries of a weight a sparse method trains."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from studio.data.batches import derived_seed


@dataclass(frozen=True)
class Chosen:
    """The chosen entries of one weight.

    Attributes:
        indices: Positions in row-major order, int32 ``[n]``, ascending, on the weight's device.
        bound: Magnitude that all chosen entries are below (``smallest``) or not below (``largest``).
    """

    indices: Tensor
    bound: float


@dataclass(frozen=True)
class Selection:
    """A rule that picks entries of weights by their magnitude in fp32, alike on every device.

    ``threshold`` or ``quantile`` says how many entries of each weight are chosen, ``which`` says which ones.
    SaRA, arXiv:2409.06633, Eq. 2; the others are its ablations, with as many entries of each weight.

    Attributes:
        which: ``smallest`` (the paper's), ``largest`` or ``random``.
        threshold: As many as have a magnitude below it, of each weight.
        quantile: This share of each weight, in (0, 1]; exactly one of the two is given.
        seed: Of the random choice.
    """

    which: Literal["smallest", "largest", "random"]
    threshold: float | None
    quantile: float | None
    seed: int = 0

    def count(self, weight: Tensor) -> int:
        """Return how many entries are chosen; by quantile the shape tells, also on the meta device."""
        if self.quantile is not None:
            return math.floor(self.quantile * weight.numel() + 0.5)
        assert self.threshold is not None
        return int((weight.detach().float().abs() < self.threshold).sum())

    def choose(self, weight: Tensor, *, name: str) -> Chosen:
        """Return the chosen entries; of equal magnitudes those that come first.

        Args:
            weight: Floating, of any shape and strides.
            name: Of the weight; the random choice depends on it.
        """
        number = self.count(weight)
        if self.which == "random":
            generator = torch.Generator().manual_seed(derived_seed(self.seed, name, "selection"))
            order = torch.randperm(weight.numel(), generator=generator)[:number]
            return Chosen(order.int().sort().values.to(weight.device), math.inf)
        magnitudes = weight.detach().float().abs().flatten()
        if not number:
            return Chosen(torch.empty(0, dtype=torch.int32, device=weight.device), 0.0)
        # The largest magnitudes are the smallest of their negatives.
        keys = magnitudes if self.which == "smallest" else -magnitudes
        last = keys.kthvalue(number).values
        chosen = keys < last
        ties = (keys == last).nonzero().flatten()
        chosen[ties[: number - int(chosen.sum())]] = True
        return Chosen(chosen.nonzero().flatten().int(), self._bound(float(last.abs())))

    def holds(self, values: Tensor, bound: float) -> Tensor:
        """Return for values of chosen entries whether the rule would choose them still, boolean ``[n]``.

        A random choice holds always.
        """
        if self.which == "random":
            return torch.ones_like(values, dtype=torch.bool)
        below = values.abs() < bound
        return below if self.which == "smallest" else ~below

    def _bound(self, last: float) -> float:
        if self.which == "largest":
            return last
        # The last chosen entry is below the bound, too.
        own = torch.nextafter(torch.tensor(last), torch.tensor(math.inf)).item()
        return own if self.threshold is None else self.threshold
