"""LoHa (FedPara, arXiv:2108.06098): the entrywise product of two low-rank products."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studio.registry import TRAINERS
from studio.trainers.layer_method import PEFT_NAME, LayerMethod, RankOptions, copied, grouped_by, inject

if TYPE_CHECKING:
    import torch
    from torch import nn

    from studio.adapters.kinds.loha import LohaChange

# LyCORIS's start; the zeros make the product change nothing, and the others let its gradient through.
_DEVIATIONS = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}


class LohaOptions(RankOptions):
    """Options of the method ``loha``."""


@TRAINERS.register("loha")
class Loha(LayerMethod):
    """Learn products of two low-rank matrices: the square of the rank for twice the size."""

    Options = LohaOptions
    kind = "loha"
    options: LohaOptions

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str:
        """Return what peft lacks."""
        return "peft has no layers of LoHa for quantised weights"

    @property
    def rank_room(self) -> int:
        """Once: a higher rank than the layer's smaller side says nothing more."""
        return 1

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put peft's layers around these."""
        from peft import LoHaConfig

        inject(
            module,
            (
                LoHaConfig(r=rank, alpha=self.options.alpha or rank, target_modules=names)
                for rank, names in grouped_by(layers, lambda name: ranks[name]).items()
            ),
        )

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the four factors."""
        return {name: getattr(layer, name)[PEFT_NAME] for name in _DEVIATIONS}

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Draw three factors and set one to zero."""
        import torch

        for name, factor in self.parameters(layer).items():
            factor.copy_(torch.randn(factor.shape, generator=generator) * _DEVIATIONS[name])

    def change(self, layer: Any) -> "LohaChange":
        """Return the product."""
        from studio.adapters.kinds.loha import LohaChange

        factors = {name.removeprefix("hada_"): copied(own) for name, own in self.parameters(layer).items()}
        return LohaChange(
            **factors, scale=layer.scaling[PEFT_NAME], shape=tuple(layer.base_layer.weight.shape)
        )
