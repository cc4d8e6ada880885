"""Low-rank changes of a weight's direction, and its length learned apart.

    W' = m * V / ||V||,    V = W + alpha / rank * up @ down                     DoRA, arXiv:2402.09353, Eq. 5

There is one length per output (the paper's, peft's, LyCORIS's since version 3) or per input (older LyCORIS).
At a weight w the direction gets w times its change and the length goes w of its way, from the base at 0 to
the adapter at 1:

    V_w = W + w * (V - W),    m_w = ||W|| + w * (m - ||W||)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.kinds.lora import LoraChange
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@KINDS.register("dora")
@dataclass(frozen=True, eq=False)
class DoraChange:
    """A change of one weight's direction and length.

    Attributes:
        direction: The low-rank change of ``V``.
        magnitude: ``m``, ``[out]`` or ``[in]``.
        per_input: Whether there is one length per input instead of one per output.
    """

    direction: LoraChange
    magnitude: Tensor
    per_input: bool = False

    required: ClassVar[frozenset[str]] = LoraChange.required | {"dora_scale"}
    optional: ClassVar[frozenset[str]] = LoraChange.optional

    @property
    def rank(self) -> int:
        """Inner dimension of the direction's change."""
        return self.direction.rank

    @property
    def alpha(self) -> float:
        """Of the direction's change."""
        return self.direction.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes."""
        return self.direction.shape

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``m_w * V_w / ||V_w|| - W``, fp32, of the base's shape and on its device."""
        import torch

        plain = base.float()
        turned = plain + self.direction.delta(base, weight=weight)
        length = torch.lerp(self._norm(plain), self._along(self.magnitude).to(plain), weight)
        # Rows of zeros have no direction and stay zero.
        smallest = torch.finfo(torch.float32).tiny
        return length / self._norm(turned).clamp_min(smallest) * turned - plain

    def low_rank(self) -> None:
        """Return None: dividing by lengths leaves no low rank."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, DoraChange]:
        """Return the change of the module's weight; the shape of ``dora_scale`` tells outputs from inputs.

        Raises:
            ValueError: If the factors do not fit each other, alpha is no usable number, or the magnitudes are
                neither one per output nor one per input.
        """
        direction = LoraChange.from_parts(parts)["weight"]
        magnitude = parts["dora_scale"]
        if not magnitude.is_floating_point():
            raise ValueError(f"dora_scale is {magnitude.dtype}, a floating type was expected")
        given = [*magnitude.shape, 1]
        if given[0] == direction.shape[0] and magnitude.numel() == given[0]:
            per_input = False
        elif given[:2] == [1, direction.shape[1]] and magnitude.numel() == given[1]:
            per_input = True
        else:
            raise ValueError(
                f"dora_scale has shape {list(magnitude.shape)}, one number for each of "
                f"{direction.shape[0]} outputs or {direction.shape[1]} inputs was expected"
            )
        return {"weight": cls(direction, magnitude.flatten(), per_input)}

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the parts to write beside that alpha, the magnitudes as LyCORIS has them."""
        return {**self.direction.to_parts(alpha=alpha), "dora_scale": self._along(self.magnitude)}

    def fitted(self, shape: tuple[int, ...]) -> DoraChange | None:
        """Return the change for that weight: linear layers and 1x1 convolutions stand for each other."""
        direction = self.direction.fitted(shape)
        return None if direction is None else replace(self, direction=direction)

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> DoraChange:
        """Return a random change of rank 3 and alpha 2 with lengths of about a random base's."""
        import torch

        direction = LoraChange.sample(shape, generator=generator)
        lengths = 0.5 + torch.rand(shape[0], generator=generator)
        return cls(direction, lengths * torch.empty(shape[1:]).numel() ** 0.5)

    def _along(self, magnitude: Tensor) -> Tensor:
        """Return the magnitudes with axes like the weight's: ``[out, 1, ...]`` or ``[1, in, ...]``."""
        axes = [1] * len(self.shape)
        axes[int(self.per_input)] = -1
        return magnitude.reshape(axes)

    def _norm(self, weight: Tensor) -> Tensor:
        import torch

        others = [axis for axis in range(weight.ndim) if axis != int(self.per_input)]
        norm: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        return norm
