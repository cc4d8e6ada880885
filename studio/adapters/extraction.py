"""Approximate any adapter by low-rank changes, for tools that read nothing else, and say what is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from studio.adapters.adapter import Adapter, Change
from studio.adapters.factors import as_lora, truncated
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Extraction:
    """A low-rank approximation and how far it is off.

    Attributes:
        adapter: The approximation, of the kind "lora".
        residuals: ``||delta - low_rank|| / ||delta||`` by parameter, Frobenius norm; 0 is exact.
        lost: Parameters without a low-rank form, biases and norms; their changes are left out.
        total: The same ratio over the whole adapter, what is left out included.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    lost: tuple[str, ...]
    total: float

    def lines(self) -> list[str]:
        """Return what a person should know before using it."""
        worst = max(self.residuals, key=lambda name: self.residuals[name])
        middle = median(self.residuals.values())
        rows = [
            f"relative residual (Frobenius) {self.total:.3f}: median {middle:.3f}, worst "
            f"{self.residuals[worst]:.3f} at {worst}"
        ]
        if self.lost:
            more = f" and {len(self.lost) - 4} more" if len(self.lost) > 4 else ""
            names = ", ".join(self.lost[:4])
            rows.append(f"without a low-rank form, left out: {len(self.lost)} parameters: {names}{more}")
        return rows


@torch.no_grad()
def extract_low_rank(adapter: Adapter, pipe: Any, *, rank: int) -> Extraction:
    """Return the best approximation of each weight's change by a product of that rank.

    Args:
        adapter: Of any kind.
        pipe: The base that it is for; changes of some kinds depend on its weights.
        rank: At most this, and no more than the weight's smaller side.

    Raises:
        UsageError: If the rank is less than 1.
        AdapterError: If no change has a low-rank form.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}.")
    components = components_of(pipe)
    changes: dict[str, Change] = {}
    residuals: dict[str, float] = {}
    lost, missed, whole = [], 0.0, 0.0
    for name, change in adapter.changes.items():
        delta = change.delta(find_parameter(components, name).detach(), weight=1.0).cpu().double()
        size = float(delta.norm())
        if not size:
            continue
        if delta.ndim < 2:
            lost.append(name)
            remainder = size
        else:
            factors, values = truncated(delta, rank)
            changes[name], remainder = as_lora(factors, delta.shape), float(values[rank:].norm())
            residuals[name] = remainder / size
        whole, missed = whole + size**2, missed + remainder**2
    if not changes:
        raise AdapterError(
            f"adapter '{adapter.name}' changes no weight of a linear layer or convolution, so it has no "
            "low-rank form. Write it without a rank."
        )
    total = (missed / whole) ** 0.5
    metadata = {**adapter.metadata, "studio.extracted": f"rank {rank}, relative residual {total:.4f}"}
    low_rank = replace(adapter, kind="lora", changes=changes, metadata=metadata)
    return Extraction(low_rank, residuals, tuple(lost), total)
