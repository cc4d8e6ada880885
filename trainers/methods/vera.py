"""VeRA, arXiv:2310.11454: two random matrices that all layers share, and two learned vectors for each."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from studio.registry import TRAINERS
from studio.trainers.layer_method import PEFT_NAME, LayerMethod, LayerOptions, copied, inject

if TYPE_CHECKING:
    import torch
    from torch import nn

    from studio.adapters.kinds.lora import LoraChange
    from studio.specs.train import TrainSpec


class VeraOptions(LayerOptions):
    """Options of the method ``vera``."""

    targets: Literal["attention", "attention+ff"] = Field(
        "attention", description="Layers that learn: attention projections, or also feed-forward."
    )
    rank: int = Field(
        64,
        ge=1,
        description="Inner width of the shared matrices. It costs little in training, but the file is an "
        "ordinary LoRA of this rank.",
    )
    d_initial: float = Field(0.1, gt=0, description="Start of the vector behind the down matrix.")


@TRAINERS.register("vera")
class Vera(LayerMethod):
    """Learn scales of random matrices that all layers share: very few numbers, written as a LoRA.

    Other tools have no form for VeRA.
    """

    Options = VeraOptions
    kind = "lora"
    options: VeraOptions

    @classmethod
    def learning_rate(cls, spec: "TrainSpec") -> float:
        """Return ten times LoRA's, as in the paper: the vectors are few and multiply random numbers."""
        return 1e-2

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put peft's layers around these; the matrices are drawn from the seed, the same for all networks."""
        from peft import VeraConfig

        config = VeraConfig(
            r=self.options.rank,
            d_initial=self.options.d_initial,
            projection_prng_key=self.seed,
            target_modules=list(layers),
        )
        inject(module, [config])

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the two vectors."""
        return {name: getattr(layer, f"vera_lambda_{name}")[PEFT_NAME] for name in "db"}

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Leave peft's start, which draws nothing for single layers: d the same number, b zero."""

    def change(self, layer: Any) -> "LoraChange":
        """Return ``diag(b) B diag(d) A`` with the parts of the shared matrices that the layer uses."""
        from studio.adapters.kinds.lora import LoraChange

        d, b = (copied(vector) for vector in self.parameters(layer).values())
        down = copied(layer.vera_A[PEFT_NAME])[:, : layer.in_features]
        up = copied(layer.vera_B[PEFT_NAME])[: layer.out_features]
        return LoraChange(d[:, None] * down, b[:, None] * up, float(len(down)))
