"""What LoRA and DoRA share: peft's low-rank layers, and what can be chosen about their two matrices."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from studio.trainers.layer_method import (
    PEFT_NAME,
    LayerMethod,
    RankOptions,
    copied,
    grouped_by,
    inject,
)

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import Tensor, nn

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange


class LowRankOptions(RankOptions):
    """Options of methods with a down and an up matrix."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the layers' inputs dropped on the adapter's path in training."
    )
    rslora: bool = Field(
        False,
        description="Multiply by alpha / sqrt(rank) instead, so that high ranks learn (rsLoRA, "
        "arXiv:2312.03732).",
    )
    lora_plus_ratio: float = Field(
        1.0,
        gt=0,
        description="The up matrix learns at this many times the rate (LoRA+, arXiv:2402.12354).",
    )
    freeze_down: bool = Field(
        False,
        description="Train the up matrix only, which takes less memory (LoRA-FA, arXiv:2308.03303).",
    )


class LowRankMethod(LayerMethod):
    """A method of peft's low-rank layers.

    Attributes:
        use_dora: Whether the layers learn magnitudes, too.
    """

    options: LowRankOptions
    use_dora = False

    @property
    def rank_room(self) -> int:
        """Once: a higher rank than the layer's smaller side says nothing more."""
        return 1

    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put peft's layers around these."""
        inject(module, self.configs(layers, ranks, dropout=self.options.dropout))

    def configs(
        self, layers: Iterable[str], ranks: Mapping[str, int], *, dropout: float = 0.0
    ) -> "Iterator[LoraConfig]":
        """Go through peft's configurations, one for each rank."""
        from peft import LoraConfig

        options = self.options
        for rank, names in grouped_by(layers, lambda name: ranks[name]).items():
            yield LoraConfig(
                r=rank,
                lora_alpha=float(rank) if options.alpha is None else options.alpha,
                lora_dropout=dropout,
                use_rslora=options.rslora,
                use_dora=self.use_dora,
                target_modules=names,
            )

    def parameters(self, layer: Any) -> "dict[str, nn.Parameter]":
        """Return the matrices, or the up matrix alone."""
        down, up = layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight
        return {"up": up} if self.options.freeze_down else {"down": down, "up": up}

    def rate_factors(self) -> Mapping[str, float]:
        """Return the ratio of LoRA+."""
        return {"up": self.options.lora_plus_ratio}

    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Draw the down matrix as nn.Linear would, and set the up matrix to zero."""
        from torch import nn

        draw(layer.lora_A[PEFT_NAME].weight, generator)
        nn.init.zeros_(layer.lora_B[PEFT_NAME].weight)

    @classmethod
    def refuses_start(cls, options: Any) -> str | None:
        """Return None: the two matrices are what a file holds."""
        return None

    def start_from(self, adapter: "Adapter") -> None:
        """Start with the matrices of an adapter."""
        from studio.trainers.start_file import check_kind, check_layers
        from studio.trainers.targets import canonical_name

        check_kind(adapter, self.kind)
        layers = {canonical_name(component, name): layer for component, name, layer in self.added}
        check_layers(adapter, {name: layer.r[PEFT_NAME] for name, layer in layers.items()})
        for name, layer in layers.items():
            self.take(layer, adapter.changes[name])

    def take(self, layer: Any, change: Any) -> None:
        """Give an added layer the matrices of a change that fits it."""
        from studio.trainers.start_file import set_product

        set_product(layer, change)

    def state(self) -> "dict[str, Tensor]":
        """Return the matrices that are not trained: some starts see the data, others take long to find."""
        return dict(self._untrained())

    def load_state(self, state: "Mapping[str, Tensor]") -> None:
        """Take back the matrices that are not trained."""
        for name, matrix in self._untrained():
            matrix.data.copy_(state[name])

    def _untrained(self) -> "Iterator[tuple[str, Tensor]]":
        for component, name, layer in self.added:
            for role in ("lora_A", "lora_B"):
                for key, parameter in getattr(layer, role).named_parameters():
                    if not parameter.requires_grad:
                        yield f"{component}.{name}.{role}.{key}", parameter

    def product(self, layer: Any) -> "LoraChange":
        """Return the matrices' product; its alpha stands for the scale by which all tools multiply."""
        from studio.adapters.kinds.lora import LoraChange

        down, up = (copied(matrix[PEFT_NAME].weight) for matrix in (layer.lora_A, layer.lora_B))
        return LoraChange(down, up, self._scaled(float(layer.lora_alpha[PEFT_NAME]), len(down)))

    def facts(self) -> Mapping[str, str]:
        """Return kohya's entries; ranks of single blocks only the tensors tell."""
        options = self.options
        alpha = self._scaled(float(options.rank) if options.alpha is None else options.alpha, options.rank)
        return {
            "ss_network_dim": str(options.rank),
            "ss_network_alpha": f"{alpha:g}",
            "ss_network_dropout": f"{options.dropout:g}",
        }

    def _scaled(self, alpha: float, rank: int) -> float:
        """Return the alpha that makes alpha / rank the scale that peft multiplies by."""
        return alpha * math.sqrt(rank) if self.options.rslora else alpha


def draw(matrix: "Tensor", generator: "torch.Generator") -> None:
    """Fill a matrix as nn.Linear would, with the same numbers on every device."""
    import torch
    from torch import nn

    drawn = torch.empty(matrix.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    matrix.copy_(drawn)
