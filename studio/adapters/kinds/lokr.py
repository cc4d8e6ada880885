"""Changes that are a Kronecker product.

    delta = scale * kron(w1, w2)                                        DiffuseKronA, arXiv:2402.17412, Eq. 4

    w1: [a, c],  w2: [b, d * kh * kw],  a * b = out,  c * d = in

Each factor may be a product of two thin ones; only then a file's alpha counts: scale = alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.adapter import interchangeable
from studio.adapters.kinds.loha import multiplied_out
from studio.adapters.kinds.lora import alpha_of, check_factors
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Factor = tuple["Tensor"] | tuple["Tensor", "Tensor"]
"""A whole factor, or ``[rows, rank]`` and ``[rank, columns]`` whose product it is."""


@KINDS.register("lokr")
@dataclass(frozen=True, eq=False)
class LokrChange:
    """A change of one weight by a Kronecker product.

    Attributes:
        first: ``w1`` ``[a, c]``.
        second: ``w2`` ``[b, d]`` or ``[b, d, kh, kw]``; as a product always ``[b, d * kh * kw]``.
        scale: The product is multiplied by this.
        shape: Shape of the weight; ``[out, in * kh * kw]`` as long as no base tells the kernel of a product.
    """

    first: Factor
    second: Factor
    scale: float
    shape: tuple[int, ...]

    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"}
    )

    @property
    def rank(self) -> int | None:
        """Inner dimension of the factors that are products; None if both are whole."""
        ranks = [factor[1].shape[0] for factor in (self.first, self.second) if len(factor) == 2]
        return ranks[0] if ranks else None

    @property
    def alpha(self) -> None:
        """Nothing to choose: files get the rank, so that tools agree on a factor of 1."""
        return None

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight * scale * kron(w1, w2)``, fp32, of the base's shape and on its device."""
        import torch

        w1, w2 = (_whole(factor, base.device).flatten(1) for factor in (self.first, self.second))
        return (weight * self.scale * torch.kron(w1, w2)).reshape(base.shape)

    def low_rank(self) -> None:
        """Return None: a Kronecker product has in general full rank."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, LokrChange]:
        """Return the change of the module's weight; a missing alpha means the rank.

        Raises:
            ValueError: If a factor is missing or given twice, or alpha is no usable number.
        """
        first, second = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
        kernel: tuple[int, ...] = ()
        if "lokr_t2" in parts:
            if len(second) == 1:
                raise ValueError("lokr_t2 belongs to lokr_w2_a and lokr_w2_b, not to lokr_w2")
            kernel = tuple(parts["lokr_t2"].shape[2:])
            second = multiplied_out(parts["lokr_t2"], *second)
        for name, factor in (("lokr_w1", first), ("lokr_w2", second)):
            if len(factor) == 2:
                check_factors(f"{name}_a", factor[0], f"{name}_b", factor[1])
        if first[0].ndim != 2 or second[0].ndim not in (2, 4):
            sizes = f"lokr_w1 {list(first[0].shape)} and lokr_w2 {list(second[0].shape)}"
            raise ValueError(f"{sizes} are the factors of neither a linear layer nor a convolution")
        ranks = {factor[1].shape[0] for factor in (first, second) if len(factor) == 2}
        if len(ranks) > 1:
            raise ValueError(f"lokr_w1 and lokr_w2 differ in rank, {' and '.join(map(str, sorted(ranks)))}")
        scale = alpha_of(parts, rank=min(ranks)) / min(ranks) if ranks else 1.0
        kernel = kernel or tuple(second[0].shape[2:])
        columns = first[-1].shape[1] * math.prod(second[-1].shape[1:]) // math.prod(kernel)
        size = (first[0].shape[0] * second[0].shape[0], columns, *kernel)
        return {"weight": cls(first, second, scale, size)}

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the factors with their scale folded in, and the alpha that stands for a factor of 1."""
        import torch

        first = self.first
        if self.scale != 1:
            first = (first[0].float() * self.scale, *first[1:])
        parts = {"alpha": torch.tensor(float(self.rank or 1))}
        for name, factor in (("lokr_w1", first), ("lokr_w2", self.second)):
            names = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b")
            parts |= dict(zip(names, factor, strict=True))
        return parts

    def fitted(self, shape: tuple[int, ...]) -> LokrChange | None:
        """Return the change for that weight; linear layers and 1x1 convolutions stand for each other."""
        if len(self.second) == 1:
            whole = self.second[0]
            if not interchangeable(shape, self.shape):
                return None
            return replace(self, second=(whole.reshape(*whole.shape[:2], *shape[2:]),), shape=shape)
        same = (shape[:1], math.prod(shape[1:])) == (self.shape[:1], math.prod(self.shape[1:]))
        return replace(self, shape=shape) if same and len(shape) in (2, 4) else None

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> LokrChange:
        """Return a random change of about the base's own size: of rank 2 where its second factor is large."""
        import torch

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        (a, b), (c, d) = (_halved(side) for side in shape[:2])
        if max(b, d) <= 4:
            return cls((draw(a, c),), (draw(b, d, *shape[2:]),), 1.0, shape)
        return cls((draw(a, c),), (draw(b, 2), draw(2, d * math.prod(shape[2:]))), 0.75, shape)


def _factor(parts: Mapping[str, Tensor], name: str) -> Factor:
    halves = [f"{name}_{half}" for half in "ab" if f"{name}_{half}" in parts]
    if name in parts and halves:
        raise ValueError(f"it holds both {name} and {halves[0]}, which are one factor")
    if name in parts:
        if not parts[name].is_floating_point():
            raise ValueError(f"{name} is {parts[name].dtype}, a floating type was expected")
        return (parts[name],)
    if len(halves) < 2:
        raise ValueError(f"it lacks {name}, and {name}_a or {name}_b in its stead")
    return parts[halves[0]], parts[halves[1]]


def _whole(factor: Factor, device: torch.device) -> Tensor:
    if len(factor) == 1:
        return factor[0].to(device).float()
    left, right = (half.to(device).float() for half in factor)
    return left @ right


def _halved(side: int) -> tuple[int, int]:
    """Return the factors of a side that are nearest to each other, the smaller one first."""
    small = next(number for number in range(math.isqrt(side), 0, -1) if side % number == 0)
    return small, side // small
