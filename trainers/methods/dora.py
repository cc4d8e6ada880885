"""DoRA, arXiv:2402.09353: LoRA on the weights' directions, their lengths learned apart."""

from typing import TYPE_CHECKING, Any

from studio.registry import TRAINERS
from studio.trainers.layer_method import PEFT_NAME, copied
from studio.trainers.low_rank import LowRankMethod, LowRankOptions

if TYPE_CHECKING:
    from torch import nn

    from studio.adapters.kinds.dora import DoraChange


class DoraOptions(LowRankOptions):
    """Options of the method ``dora``."""


@TRAINERS.register("dora")
class Dora(LowRankMethod):
    """LoRA that also learns the length of every weight vector: nearer to full training, and slower.

    peft's layers send no gradients through the lengths' divisor. The default format is the one
    whose reader computes what was trained: of the tools that read kohya's names, LyCORIS alone does.
    """

    Options = DoraOptions
    kind = "dora"
    format = "diffusers"
    use_dora = True

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str | None:
        """Return what happens when peft's layers look at 8-bit weights to measure their lengths."""
        return "peft's layers of DoRA lose the scales of 8-bit weights; take nf4" if kind == "int8" else None

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the matrices and the magnitudes."""
        return {**super().parameters(layer), "magnitude": layer.lora_magnitude_vector[PEFT_NAME].weight}

    def take(self, layer: Any, change: "DoraChange") -> None:
        """Give an added layer the matrices and the magnitudes of a change that fits it."""
        from studio.trainers.start_file import set_lengths

        super().take(layer, change.direction)
        set_lengths(layer, change)

    def change(self, layer: Any) -> "DoraChange":
        """Return the product and the magnitudes."""
        from studio.adapters.kinds.dora import DoraChange

        magnitude = copied(layer.lora_magnitude_vector[PEFT_NAME].weight).flatten()
        return DoraChange(self.product(layer), magnitude)
