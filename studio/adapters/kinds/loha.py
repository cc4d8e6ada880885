"""Changes that are the entrywise product of two low-rank products.

    delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)                FedPara, arXiv:2108.06098, Prop. 1

The entrywise product reaches the rank ``rank ** 2``. For a convolution the kernel is flattened into ``w1_b``
and ``w2_b``. LyCORIS's Tucker form, in which the kernel lies in a tensor of its own, is multiplied out when
read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.kinds.lora import alpha_of, check_factors
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@KINDS.register("loha")
@dataclass(frozen=True, eq=False)
class LohaChange:
    """A change of one weight by an entrywise product.

    Attributes:
        w1_a: ``[out, rank]``, and ``w2_a`` alike.
        w1_b: ``[rank, in * kh * kw]``, and ``w2_b`` alike.
        w2_a: See ``w1_a``.
        w2_b: See ``w1_b``.
        scale: The product is multiplied by this, in files alpha / rank.
        shape: Shape of the weight; ``[out, in * kh * kw]`` as long as no base tells the kernel.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float
    shape: tuple[int, ...]

    required: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    optional: ClassVar[frozenset[str]] = frozenset({"hada_t1", "hada_t2", "alpha"})

    @property
    def rank(self) -> int:
        """Inner dimension of each of the two products."""
        return self.w1_b.shape[0]

    @property
    def alpha(self) -> None:
        """Nothing to choose: files get the rank, as LyCORIS applies another factor twice when it merges."""
        return None

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight`` times the change, fp32, of the base's shape and on its device."""
        w1_a, w1_b, w2_a, w2_b = (
            factor.to(base.device).float() for factor in (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        )
        return (weight * self.scale * (w1_a @ w1_b) * (w2_a @ w2_b)).reshape(base.shape)

    def low_rank(self) -> None:
        """Return None: the product's rank is up to the square of its factors'."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, LohaChange]:
        """Return the change of the module's weight; a missing alpha means the rank.

        Raises:
            ValueError: If the factors do not fit each other or alpha is no usable number.
        """
        kernels = [parts[name] for name in ("hada_t1", "hada_t2") if name in parts]
        if len(kernels) == 1:
            raise ValueError("it holds one of hada_t1 and hada_t2, which only go together")
        pairs = [(parts[f"hada_{name}_a"], parts[f"hada_{name}_b"]) for name in ("w1", "w2")]
        kernel: tuple[int, ...] = ()
        if kernels:
            kernel = tuple(kernels[0].shape[2:])
            pairs = [
                multiplied_out(core, left, right) for core, (left, right) in zip(kernels, pairs, strict=True)
            ]
        for name, (left, right) in zip(("hada_w1", "hada_w2"), pairs, strict=True):
            check_factors(f"{name}_a", left, f"{name}_b", right)
        (w1_a, w1_b), (w2_a, w2_b) = pairs
        if w1_a.shape != w2_a.shape or w1_b.shape != w2_b.shape:
            sizes = ", ".join(str(list(factor.shape)) for factor in (w1_a, w1_b, w2_a, w2_b))
            raise ValueError(f"its two products are of different sizes: {sizes}")
        inputs = w1_b.shape[1] // math.prod(kernel)
        scale = alpha_of(parts, rank=w1_b.shape[0]) / w1_b.shape[0]
        return {"weight": cls(w1_a, w1_b, w2_a, w2_b, scale, (w1_a.shape[0], inputs, *kernel))}

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the factors with their scale folded in; they have the rank as their alpha."""
        import torch

        w1_a = self.w1_a if self.scale == 1 else self.w1_a.float() * self.scale
        return {
            "hada_w1_a": w1_a,
            "hada_w1_b": self.w1_b,
            "hada_w2_a": self.w2_a,
            "hada_w2_b": self.w2_b,
            "alpha": torch.tensor(float(self.rank)),
        }

    def fitted(self, shape: tuple[int, ...]) -> LohaChange | None:
        """Return the change for that weight, whose kernel the factors hold flattened."""
        if len(shape) not in (2, 4) or (shape[0], math.prod(shape[1:])) != self._flat:
            return None
        return replace(self, shape=shape)

    @property
    def _flat(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> LohaChange:
        """Return a random change of rank 3 and alpha 2, of about the base's own size."""
        import torch

        sizes = [(shape[0], 3), (3, math.prod(shape[1:]))] * 2
        w1_a, w1_b, w2_a, w2_b = (torch.randn(size, generator=generator) * 0.6 for size in sizes)
        return cls(w1_a, w1_b, w2_a, w2_b, 2 / 3, shape)


def multiplied_out(core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two factors that stand for LyCORIS's three of a convolution.

    Args:
        core: ``[rank, rank, kh, kw]``.
        left: ``[rank, out]``.
        right: ``[rank, in]``.

    Returns:
        ``[out, rank]`` and, fp32, ``[rank, in * kh * kw]``.

    Raises:
        ValueError: If they do not fit each other.
    """
    import torch

    ranks = {left.shape[0], right.shape[0], *core.shape[:2]} if core.ndim == 4 else set()
    if len(ranks) != 1 or (left.ndim, right.ndim) != (2, 2):
        sizes = f"{list(core.shape)}, {list(left.shape)} and {list(right.shape)}"
        raise ValueError(f"{sizes} are no Tucker factors, [r, r, kh, kw], [r, out] and [r, in] were expected")
    return left.T, torch.einsum("sthw,ti->sihw", core.float(), right.float()).flatten(1)
