"""Rotations of a weight's outputs, block by block.

    W' = s * R W,    R = (I + Q)^-1 (I - Q),    Q = B - B^T                    OFT, arXiv:2306.07280, Sec. 3

``R`` is block diagonal over the outputs and keeps the angles between the rows of a block; ``s`` is an
optional factor per output. At a weight w the rotation goes w of its way, ``R(w Q)``, so it remains one at any
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Keeps LyCORIS's division by a norm from failing on blocks of zeros.
_LYCORIS_EPSILON = 1e-8


@KINDS.register("oft")
@dataclass(frozen=True, eq=False)
class OftChange:
    """A rotation of one weight's outputs.

    Attributes:
        blocks: ``B``, ``[blocks, side, side]``; blocks times side is the number of outputs.
        rescale: ``s``, ``[out]``, or None.
        shape: Shape of the weight; ``[out]`` as long as no base tells the rest.
    """

    blocks: Tensor
    rescale: Tensor | None
    shape: tuple[int, ...]

    required: ClassVar[frozenset[str]] = frozenset({"oft_blocks"})
    optional: ClassVar[frozenset[str]] = frozenset({"rescale", "alpha"})

    @property
    def alpha(self) -> None:
        """Nothing to choose: in files of this kind alpha bounds the rotation, and ours are unbounded."""
        return None

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``s_w R(w Q) W - W``, fp32, of the base's shape and on its device."""
        blocks = self.blocks.to(base.device).float()
        plain = base.float()
        turned = rotation_step(weight * (blocks - blocks.mT)) @ plain.reshape(*blocks.shape[:2], -1)
        delta = turned.reshape(base.shape)
        if self.rescale is None:
            return delta
        grown = weight * (self.rescale.to(plain).reshape(-1, *(1 for _ in base.shape[1:])) - 1)
        return delta + grown * (plain + delta)

    def low_rank(self) -> None:
        """Return None: a rotation's change has in general full rank."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, OftChange]:
        """Return the change of the module's weight, a bound on the rotation already applied.

        An alpha above 0 bounds the norm of all Q together to ``alpha * out``, as in LyCORIS and A1111.
        ComfyUI bounds it to ``alpha``.

        Raises:
            ValueError: If the parts are not those of a rotation, or alpha is no usable number.
        """
        blocks = parts["oft_blocks"]
        if blocks.ndim == 4:
            raise ValueError(
                "oft_blocks has 4 axes, which is the butterfly variant BOFT; only OFT is supported"
            )
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or not blocks.numel():
            raise ValueError(f"oft_blocks is {list(blocks.shape)}, [blocks, side, side] was expected")
        outputs = blocks.shape[0] * blocks.shape[1]
        rescale = parts.get("rescale")
        for name, tensor in parts.items():
            if not tensor.is_floating_point() and name != "alpha":
                raise ValueError(f"{name} is {tensor.dtype}, a floating type was expected")
        if rescale is not None and (rescale.numel() != outputs or rescale.shape[:1] != (outputs,)):
            raise ValueError(
                f"rescale is {list(rescale.shape)}, one number per output ({outputs}) was expected"
            )
        bound = parts.get("alpha")
        if bound is not None:
            if bound.numel() != 1 or float(bound) < 0:
                raise ValueError("alpha is no bound on the rotation: one number from 0 on was expected")
            blocks = _bounded(blocks, float(bound) * outputs)
        return {"weight": cls(blocks, None if rescale is None else rescale.flatten(), (outputs,))}

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the parts to write; their alpha 0, which LyCORIS cannot do without, means no bound."""
        import torch

        parts = {"oft_blocks": self.blocks, "alpha": torch.tensor(0.0)}
        if self.rescale is not None:
            parts["rescale"] = self.rescale.reshape(-1, *(1 for _ in self.shape[1:]))
        return parts

    def fitted(self, shape: tuple[int, ...]) -> OftChange | None:
        """Return the change for that weight: it fits all with as many outputs."""
        fits = shape == self.shape or (len(shape) in (2, 4) and shape[0] == self.shape[0])
        return replace(self, shape=shape) if fits else None

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> OftChange:
        """Return a random rotation with random factors."""
        import torch

        side = block_side(shape[0], largest=shape[0])
        blocks = torch.randn(shape[0] // side, side, side, generator=generator) * 0.5
        return cls(blocks, 0.5 + torch.rand(shape[0], generator=generator), shape)


def rotation_step(skew: Tensor) -> Tensor:
    """Return ``(I + Q)^-1 (I - Q) - I`` for skew-symmetric ``Q`` ``[..., side, side]``; zeros give zeros.

    Cayley's transform without the identity, which would cost small rotations their digits.
    """
    import torch

    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    step: Tensor = torch.linalg.solve(identity + skew, -2 * skew)
    return step


def block_side(outputs: int, *, largest: int) -> int:
    """Return the side of the blocks for so many outputs.

    It is the largest divisor up to ``largest`` and to the square root: LyCORIS loads no fewer blocks than the
    side of one.
    """
    return next(
        side
        for side in range(outputs, 0, -1)
        if outputs % side == 0 and side <= largest and side**2 <= outputs
    )


def _bounded(blocks: Tensor, bound: float) -> Tensor:
    wide = blocks.float()
    norm = float((wide - wide.mT).norm()) + _LYCORIS_EPSILON
    return wide * (bound / norm) if 0 < bound < norm else blocks
