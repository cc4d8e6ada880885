"""Sparse changes: any entries of any parameter, of full rank.

    delta[i] = values[k] where i = indices[k], else 0           SaRA, arXiv:2409.06633, Sec. 3.2: dP = P - P0

Files hold the indices as gaps, two bytes an entry instead of four: how far each entry lies behind the one
before it (the first behind position -1). A gap from 1 to 65535 is written as such, in the bits of an int16; a
0 goes 65535 positions on without an entry, so every gap can be written and no order but the right one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.adapter import interchangeable
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LONGEST_GAP = 0xFFFF
# Positions are int32.
_MOST_ENTRIES = 2**31 - 1
_PARAMETERS = ("weight", "bias")
_PARTS = ("gaps", "delta", "shape")


@KINDS.register("sparse")
@dataclass(frozen=True, eq=False)
class SparseChange:
    """A change of some entries of one parameter: weight, bias, norm or kernel.

    Attributes:
        indices: Positions in the flattened parameter (row-major), int32 ``[n]``, ascending, none twice.
        values: What is added there at weight 1 (value after minus value before), floating ``[n]``, on the
            device of the indices.
        shape: Shape of the parameter.

    Raises:
        ValueError: If these do not fit each other; the text says what, got and wanted.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset(
        f"{parameter}.{part}" for parameter in _PARAMETERS for part in _PARTS
    )

    def __post_init__(self) -> None:
        import torch

        indices, values = self.indices, self.values
        if not self.shape or any(side < 1 for side in self.shape):
            raise ValueError(f"{list(self.shape)} is the shape of no parameter")
        if math.prod(self.shape) > _MOST_ENTRIES:
            raise ValueError(f"a parameter of shape {list(self.shape)} has more than {_MOST_ENTRIES} entries")
        if indices.dtype != torch.int32 or not values.is_floating_point():
            raise ValueError(
                f"indices and values are {indices.dtype} and {values.dtype}, int32 and a floating type were "
                "expected"
            )
        if indices.ndim != 1 or indices.shape != values.shape:
            raise ValueError(
                f"indices {list(indices.shape)} and values {list(values.shape)} are no lists of equal length"
            )
        if not indices.numel():
            return
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError("the indices are not in ascending order, or name an entry twice")
        first, last = int(indices[0]), int(indices[-1])
        if first < 0 or last >= math.prod(self.shape):
            raise ValueError(
                f"the indices reach from {first} to {last}, a parameter of shape {list(self.shape)} has the "
                f"entries 0 to {math.prod(self.shape) - 1}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the values hold NaN or infinity")

    @property
    def alpha(self) -> None:
        """Nothing: the values are the change itself."""
        return None

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight * values`` among zeros, fp32, of the base's shape and on its device."""
        import torch

        dense = torch.zeros(self.shape, dtype=torch.float32, device=base.device)
        dense.view(-1)[self.indices.to(base.device)] = weight * self.values.to(base.device).float()
        return dense.reshape(base.shape)

    def low_rank(self) -> None:
        """Return None: a few entries anywhere have in general full rank."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, SparseChange]:
        """Return the changes of a module's parameters from their gaps, deltas and shapes.

        Raises:
            ValueError: If a part is missing or the parts do not fit each other.
        """
        import torch

        changes = {}
        for parameter in dict.fromkeys(name.partition(".")[0] for name in parts):
            names = [f"{parameter}.{part}" for part in _PARTS]
            if missing := [name for name in names if name not in parts]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            gaps, delta, shape = (parts[name] for name in names)
            if (gaps.dtype, gaps.ndim) != (torch.int16, 1):
                raise ValueError(f"{names[0]} is {gaps.dtype} {list(gaps.shape)}, int16 [n] was expected")
            if (shape.dtype, shape.ndim) != (torch.int64, 1):
                raise ValueError(f"{names[2]} is {shape.dtype} {list(shape.shape)}, int64 [n] was expected")
            try:
                changes[parameter] = cls(_indices(gaps), delta, tuple(shape.tolist()))
            except ValueError as error:
                raise ValueError(f"in its {parameter}, {error}") from None
        return changes

    def to_parts(self, *, alpha: float, parameter: str = "weight") -> Mapping[str, Tensor]:
        """Return the parts to write for the parameter of that name in its module."""
        import torch

        coded = (_gaps(self.indices), self.values, torch.tensor(self.shape))
        return {f"{parameter}.{part}": tensor for part, tensor in zip(_PARTS, coded, strict=True)}

    def fitted(self, shape: tuple[int, ...]) -> SparseChange | None:
        """Return the change for that parameter: linear layers and 1x1 convolutions stand for each other."""
        return replace(self, shape=shape) if interchangeable(shape, self.shape) else None

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> SparseChange:
        """Return a random change of every eighth entry or so, of about the base's own size."""
        import torch

        total = math.prod(shape)
        indices = torch.randperm(total, generator=generator)[: max(1, total // 8)].sort().values
        return cls(indices.int(), torch.randn(len(indices), generator=generator), shape)


def _gaps(indices: Tensor) -> Tensor:
    """Return ascending int32 indices ``[n]`` as gaps, int16 ``[n + jumps]``."""
    import torch

    steps = indices.long().diff(prepend=indices.new_full((1,), -1))
    jumps = (steps - 1).div(_LONGEST_GAP, rounding_mode="floor")
    codes = steps.new_zeros(len(steps) + int(jumps.sum()))
    codes[(jumps + 1).cumsum(0) - 1] = steps - jumps * _LONGEST_GAP
    # Keeps the lower 16 bits.
    return codes.to(torch.int16)


def _indices(gaps: Tensor) -> Tensor:
    """Return the int32 indices ``[n]`` that gaps stand for.

    Raises:
        ValueError: If they lead beyond what int32 can say.
    """
    codes = gaps.long() & _LONGEST_GAP
    places = codes.where(codes > 0, _LONGEST_GAP).cumsum(0) - 1
    if places.numel() and int(places[-1]) > _MOST_ENTRIES:
        raise ValueError(f"the gaps lead to entry {int(places[-1])}, at most {_MOST_ENTRIES} are possible")
    return places[codes > 0].int()
