"""OFT, arXiv:2306.07280: each chosen layer's outputs are rotated, block by block."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from studio.registry import TRAINERS
from studio.trainers.layer_method import LayerMethod, LayerOptions, copied

if TYPE_CHECKING:
    import torch
    from torch import nn

    from studio.adapters.kinds.oft import OftChange


class OftOptions(LayerOptions):
    """Options of the method ``oft``."""

    block_size: int = Field(
        8,
        ge=2,
        description="Largest side of the rotated blocks, of which each layer takes the largest divisor of "
        "its outputs, up to their square root: larger learns more and makes larger files.",
    )


@TRAINERS.register("oft")
class Oft(LayerMethod):
    """Rotate the weights instead of adding to them; LyCORIS, ComfyUI and A1111 read the files.

    peft's own OFT rotates the layers' inputs instead, in a layout that no tool for pictures reads.
    """

    Options = OftOptions
    kind = "oft"
    options: OftOptions

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put rotating layers around these."""
        from studio.trainers.rotation import RotatedOutput

        for name, layer in layers.items():
            module.set_submodule(name, RotatedOutput(layer, largest=self.options.block_size))

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the blocks."""
        return {"blocks": layer.blocks}

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Leave the zeros that the blocks are made of: no rotation."""

    def change(self, layer: Any) -> "OftChange":
        """Return the rotation."""
        from studio.adapters.kinds.oft import OftChange
        from studio.models.quantization import weight_shape

        return OftChange(copied(layer.blocks), None, weight_shape(layer.base_layer.weight))
