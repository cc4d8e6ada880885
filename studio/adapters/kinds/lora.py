"""Low-rank changes of linear layers and convolutions.

    delta = alpha / rank * up @ down                                        LoRA, arXiv:2106.09685, Sec. 4.1

For a convolution the kernel belongs to ``down``: the product of the flattened factors is the flattened kernel
change. LyCORIS's Tucker form, in which the kernel lies in a tensor of its own, is multiplied out when read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.adapter import interchangeable
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@KINDS.register("lora")
@dataclass(frozen=True, eq=False)
class LoraChange:
    """A low-rank change of one weight.

    Attributes:
        down: ``lora_down`` ``[rank, in]`` or ``[rank, in, kh, kw]``.
        up: ``lora_up`` ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: The change is scaled by ``alpha / rank``.
    """

    down: Tensor
    up: Tensor
    alpha: float

    required: ClassVar[frozenset[str]] = frozenset({"lora_down.weight", "lora_up.weight"})
    optional: ClassVar[frozenset[str]] = frozenset({"lora_mid.weight", "alpha"})

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: ``[out, in]`` or ``[out, in, kh, kw]``."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight * alpha / rank * up @ down``, fp32, of the base's shape and on its device."""
        up = self.up.to(base.device).float().flatten(1)
        down = self.down.to(base.device).float().flatten(1)
        return (weight * self.alpha / self.rank * (up @ down)).reshape(base.shape)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return ``(down, up)`` with ``alpha / rank`` folded into ``up``, which is fp32."""
        return self.down, self.up.float() * (self.alpha / self.rank)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, LoraChange]:
        """Return the change of the module's weight; a missing alpha means the rank.

        Raises:
            ValueError: If the factors do not fit each other or alpha is no usable number.
        """
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        sizes = f"lora_down {list(down.shape)} and lora_up {list(up.shape)}"
        if down.ndim not in (2, 4) or up.ndim != down.ndim or any(side != 1 for side in up.shape[2:]):
            raise ValueError(f"{sizes} are the factors of neither a linear layer nor a convolution")
        check_factors("lora_up", up, "lora_down", down)
        if "lora_mid.weight" in parts:
            down = _multiplied_out(parts["lora_mid.weight"], down)
        return {"weight": cls(down, up, alpha_of(parts, rank=down.shape[0]))}

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the factors to write beside that alpha; ``up`` is fp32 where it had to change."""
        import torch

        up = self.up if alpha == self.alpha else self.up.float() * (self.alpha / alpha)
        return {"lora_down.weight": self.down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}

    def fitted(self, shape: tuple[int, ...]) -> LoraChange | None:
        """Return the change for that weight: linear layers and 1x1 convolutions stand for each other."""
        if shape == self.shape:
            return self
        if not interchangeable(shape, self.shape):
            return None
        ones = shape[2:]
        return LoraChange(
            self.down.reshape(self.rank, shape[1], *ones),
            self.up.reshape(shape[0], self.rank, *ones),
            self.alpha,
        )

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> LoraChange:
        """Return a random change of rank 3 and alpha 2, of about the base's own size."""
        import torch

        down = torch.randn(3, *shape[1:], generator=generator)
        up = torch.randn(shape[0], 3, *(1 for _ in shape[2:]), generator=generator)
        return cls(down * 0.3, up * 0.3, 2.0)


def alpha_of(parts: Mapping[str, Tensor], *, rank: int) -> float:
    """Return a module's alpha; a missing one means the rank.

    Raises:
        ValueError: If it is no usable number.
    """
    if "alpha" not in parts:
        return float(rank)
    if parts["alpha"].numel() != 1:
        raise ValueError(f"alpha has shape {list(parts['alpha'].shape)}, one number was expected")
    alpha = float(parts["alpha"].double().item())
    if alpha == 0:
        # Some tools read it as the rank and some as no effect at all.
        raise ValueError("alpha is 0, which tools understand differently; write the rank for a factor of 1")
    return alpha


def check_factors(left: str, up: Tensor, right: str, down: Tensor) -> None:
    """Check that ``up`` ``[out, rank, ...]`` and ``down`` ``[rank, in, ...]`` are the factors of a product.

    Raises:
        ValueError: If they are not; calls them ``left`` and ``right``.
    """
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{right} and {left} are {down.dtype} and {up.dtype}, floating types were expected")
    sizes = f"{right} {list(down.shape)} and {left} {list(up.shape)}"
    if min(down.ndim, up.ndim) < 2:
        raise ValueError(f"{sizes} are no two factors of a product")
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"{sizes} differ in rank, {down.shape[0]} and {up.shape[1]}")
    if 0 in down.shape or 0 in up.shape:
        raise ValueError(f"{sizes} are empty")


def _multiplied_out(mid: Tensor, down: Tensor) -> Tensor:
    """Return the ``down`` that stands for a kernel ``[rank, rank, kh, kw]`` after a pointwise one."""
    import torch

    ranks = {*mid.shape[:2], down.shape[0]}
    if mid.ndim != 4 or len(ranks) != 1 or any(side != 1 for side in down.shape[2:]):
        raise ValueError(f"lora_mid {list(mid.shape)} does not fit lora_down {list(down.shape)}")
    return torch.einsum("rshw,si->rihw", mid.float(), down.float().flatten(1))
