"""LoRA, arXiv:2106.09685: a product of two thin matrices added to each chosen layer."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from studio.registry import TRAINERS
from studio.specs.base import Options
from studio.specs.train import TrainSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from studio.adapters.adapter import Adapter
    from studio.trainers.base import ParameterGroup
    from studio.trainers.lora_layers import LoraLayers


class LoraOptions(Options):
    """Options of the method ``lora``."""

    rank: int = Field(
        8, ge=1, description="Inner width of the added matrices: more learns more and makes larger files."
    )
    alpha: float | None = Field(
        None, gt=0, description="The change is multiplied by alpha / rank; default: the rank."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the layers' inputs dropped on the adapter's path in training."
    )
    targets: Literal["attention", "attention+ff", "all"] = Field(
        "attention",
        description="Layers that learn: attention projections, also feed-forward, or all with convolutions.",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Layers left out: parts of their names, such as 'down_blocks.0' or 'attn1'."
    )
    train_text_encoder: bool = Field(False, description="Also train an adapter of the text encoder(s).")


@TRAINERS.register("lora")
class Lora:
    """Trainer of low-rank adapters through peft's layers."""

    Options = LoraOptions

    def __init__(self) -> None:
        self._layers: LoraLayers | None = None

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> "Sequence[ParameterGroup]":
        """Add the layers to the base and return their parameters by component.

        Raises:
            TrainingError: If the rank is too large for a layer, an exclusion matches nothing or nothing is
                left.
        """
        from studio.trainers.lora_layers import LoraLayers

        assert isinstance(spec.options, LoraOptions)
        self._layers = LoraLayers(pipe, spec.options, seed=spec.seed)
        return self._layers.groups(spec)

    def after_step(self, step: int) -> None:
        """Do nothing: plain LoRA has no state beside its parameters."""

    def export(self) -> "Adapter":
        """Return the adapter as it is now."""
        assert self._layers is not None
        return self._layers.export()

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context without the layers."""
        assert self._layers is not None
        return self._layers.suspended()

    def release(self) -> None:
        """Take the layers out again; may be called at any time."""
        if self._layers is not None:
            self._layers.remove()
