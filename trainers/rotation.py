"""A layer whose outputs are rotated, block by block."""

from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.kinds.oft import block_side, rotation_step
from studio.models.quantization import weight_shape


class RotatedOutput(nn.Module):
    """A linear layer or convolution followed by a rotation of its outputs; the bias is left as it is.

        y = x W^T R^T + bias,    R = (I + Q)^-1 (I - Q),    Q = B - B^T

    Args:
        base_layer: The layer; not changed.
        largest: Of the sides of the blocks.
    """

    def __init__(self, base_layer: Any, *, largest: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        outputs, device = weight_shape(base_layer.weight)[0], base_layer.weight.device
        side = block_side(outputs, largest=largest)
        self.blocks = nn.Parameter(torch.zeros(outputs // side, side, side, device=device))
        """``B``, ``[blocks, side, side]``, of which only the antisymmetric part counts."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the rotated outputs, ``[..., out]`` or ``[B, out, height, width]``."""
        outputs: Tensor = self.base_layer(inputs)
        axis = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        plain = outputs.movedim(axis, -1)
        if self.base_layer.bias is not None:
            plain = plain - self.base_layer.bias
        step = rotation_step(self.blocks - self.blocks.mT).to(plain.dtype)
        blocks = plain.unflatten(-1, self.blocks.shape[:2])
        # Added to the outputs rather than put in their place: without a rotation they keep every bit.
        added = torch.einsum("...kn,kmn->...km", blocks, step).flatten(-2)
        return outputs + added.movedim(-1, axis)
