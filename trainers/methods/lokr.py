"""LoKr (DiffuseKronA, arXiv:2402.17412): a Kronecker product added to each chosen layer."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, ValidationInfo, field_validator

from studio.registry import TRAINERS
from studio.specs.base import complete
from studio.trainers.layer_method import PEFT_NAME, LayerMethod, LayerOptions, copied, grouped_by, inject
from studio.trainers.low_rank import draw

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from studio.adapters.kinds.lokr import Factor, LokrChange

_FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class LokrOptions(LayerOptions):
    """Options of the method ``lokr``."""

    factor: int = Field(
        16,
        ge=2,
        description="Largest side of the first factor; the smaller, the more there is to learn. In small "
        "layers it is at most the square root of their smaller side.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="Split the second factor into two matrices of this inner width where that is smaller; "
        "default: whole, as in DiffuseKronA.",
    )
    alpha: float | None = Field(
        None, gt=0, description="With a rank, the change is multiplied by alpha / rank; default: the rank."
    )

    @field_validator("alpha")
    @classmethod
    def _with_a_rank(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        if alpha is not None and info.data.get("rank") is None:
            raise complete("counts only where a rank is given. Give rank, too, or leave alpha out.")
        return alpha


@TRAINERS.register("lokr")
class Lokr(LayerMethod):
    """Learn Kronecker products of small matrices: high ranks in small files (DiffuseKronA)."""

    Options = LokrOptions
    kind = "lokr"
    options: LokrOptions

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str:
        """Return what peft lacks."""
        return "peft has no layers of LoKr for quantised weights"

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put peft's layers around these."""
        from peft import LoKrConfig

        weights = {name: cast("Tensor", layer.weight) for name, layer in layers.items()}

        def largest(name: str) -> int:
            # LyCORIS cannot load a first factor with a longer side than the second one's.
            return min(self.options.factor, math.isqrt(min(weights[name].shape[:2])))

        # peft splits no factor of which the rank is half a side or more.
        rank = self.options.rank or max(max(weight.shape[:2]) for weight in weights.values())
        inject(
            module,
            (
                LoKrConfig(
                    r=rank, alpha=self.options.alpha or rank, decompose_factor=factor, target_modules=names
                )
                for factor, names in grouped_by(layers, largest).items()
            ),
        )

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the factors, or the matrices that they are split into."""
        return {name: own[PEFT_NAME] for name in _FACTORS if PEFT_NAME in (own := getattr(layer, name))}

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Draw all but the last matrix of the second factor, and set that to zero."""
        from torch import nn

        *others, last = self.parameters(layer).values()
        for matrix in others:
            draw(matrix, generator)
        nn.init.zeros_(last)

    def change(self, layer: Any) -> "LokrChange":
        """Return the product; peft multiplies by alpha / rank whether a factor is split or not."""
        from studio.adapters.kinds.lokr import LokrChange

        first, second = (_factor(self.parameters(layer), name) for name in ("lokr_w1", "lokr_w2"))
        return LokrChange(first, second, layer.scaling[PEFT_NAME], tuple(layer.base_layer.weight.shape))


def _factor(found: "Mapping[str, nn.Parameter]", name: str) -> "Factor":
    if name in found:
        return (copied(found[name]),)
    return copied(found[f"{name}_a"]), copied(found[f"{name}_b"])
