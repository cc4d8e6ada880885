"""What merging algorithms have in common: they turn the changes of one parameter into one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from studio.adapters.adapter import Change
    from studio.adapters.kinds.sparse import SparseChange


@dataclass(frozen=True, eq=False)
class Factors:
    """A product ``up @ down`` in place of the matrix that it stands for.

    Attributes:
        up: fp32 ``[out, rank]``.
        down: fp32 ``[rank, in]``, for a convolution ``[rank, in * kh * kw]``.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]


if TYPE_CHECKING:
    # What an algorithm makes of a parameter's changes: a product, some entries, or all of them (fp32).
    Target: TypeAlias = Factors | SparseChange | Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's change of a parameter at its weight.

    Attributes:
        adapter: The adapter's name.
        change: The change.
        weight: Not 0.
    """

    adapter: str
    change: Change
    weight: float

    def factors(self) -> Factors | None:
        """Return the weighted change as a product, or None if it has none."""
        pair = self.change.low_rank()
        if pair is None:
            return None
        down, up = (factor.detach().cpu().float().flatten(1) for factor in pair)
        return Factors(up * self.weight, down)


@dataclass(frozen=True, eq=False)
class Layer:
    """All changes of one parameter.

    Attributes:
        name: The parameter's canonical name.
        terms: Adapters that do not change it have none here.
        rank: What the layer is to be written at, at most its smaller side; 0 for biases and norms.
        base: The parameter, for kinds that are not the same on every base; else None.
    """

    name: str
    terms: Sequence[Term]
    rank: int
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.terms[0].change.shape)

    def delta(self, term: Term) -> Tensor:
        """Return a term's change in full, fp32 on the CPU."""
        import torch

        base = torch.empty(self.shape) if self.base is None else self.base.detach().cpu()
        return term.change.delta(base, weight=term.weight).cpu()

    def deltas(self) -> list[Tensor]:
        """Return the changes of all terms in full: as many fp32 copies of the parameter."""
        return [self.delta(term) for term in self.terms]

    def generator(self, seed: int, term: Term | None = None) -> torch.Generator:
        """Return a source of numbers of its own for this layer, or for one term of it.

        It depends on names and not on places, so the order of adapters does not matter.
        """
        import torch

        text = f"{seed}/{self.name}/{term.adapter if term else ''}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Merger(ABC):
    """A merging algorithm: a dataclass whose fields are the options that it reads.

    Attributes:
        rank: What to write at; None for the largest rank that an adapter has in the layer.
        dense: Write every entry instead.
        exact: Whether what it makes is written as it is, at whatever rank.
    """

    rank: int | None = None
    dense: bool = False
    exact: ClassVar[bool] = False

    @abstractmethod
    def merge(self, layer: Layer) -> Target:
        """Return what the changes become; the leading part of it is written unless the merger is exact."""

    def weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights to merge with, given those of all adapters."""
        return dict(weights)

    @classmethod
    def reads(cls) -> frozenset[str]:
        """Return the names of its options."""
        # Every member of the registry is a dataclass; the abstract class has no fields.
        return frozenset(field.name for field in fields(cls))  # type: ignore[arg-type]
