"""What methods have in common that put layers of their own around the base's: peft's, or one of ours."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from studio.specs.base import Options
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from studio.adapters.adapter import Adapter, Change
    from studio.trainers.added_layers import AddedLayers

PEFT_NAME = "studio"
"""peft's name of the adapter in its layers."""


class LayerOptions(Options):
    """Options of every method that adds layers."""

    targets: Literal["attention", "attention+ff", "all"] = Field(
        "attention",
        description="Layers that learn: attention projections, also feed-forward, or all with convolutions.",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Layers left out: parts of their names, such as 'down_blocks.0' or 'attn1'."
    )
    train_text_encoder: bool = Field(False, description="Also train an adapter of the text encoder(s).")
    block_learning_rates: Mapping[str, PositiveFloat] = Field(
        {},
        description="Learning rates of some layers by parts of their names, such as 'up_blocks.1'; where "
        "several match, the last counts.",
    )


class RankOptions(LayerOptions):
    """Options of methods whose layers have a rank."""

    rank: int = Field(
        8, ge=1, description="Inner width of the added matrices: more learns more and makes larger files."
    )
    alpha: float | None = Field(
        None, gt=0, description="The change is multiplied by alpha / rank; default: the rank."
    )
    block_ranks: Mapping[str, PositiveInt] = Field(
        {},
        description="Ranks of some layers by parts of their names, such as 'up_blocks.1'; where several "
        "match, the last counts.",
    )


class LayerMethod(Trainer):
    """A method that adds layers. What differs between methods is declared and answered below.

    Attributes:
        kind: Of adapter that it makes.
    """

    Options: ClassVar[type[LayerOptions]]
    kind: ClassVar[str]
    options: LayerOptions
    seed: int

    def __init__(self) -> None:
        self._added: AddedLayers | None = None

    @abstractmethod
    def add(self, module: "nn.Module", layers: "Mapping[str, nn.Module]", ranks: Mapping[str, int]) -> None:
        """Put a layer around each of these of a network.

        Args:
            module: The network.
            layers: By module name.
            ranks: By module name; empty for methods without.
        """

    @abstractmethod
    def parameters(self, layer: Any) -> "Mapping[str, nn.Parameter]":
        """Return what an added layer trains, by role."""

    @abstractmethod
    def start(self, layer: Any, *, generator: "torch.Generator") -> None:
        """Set an added layer, whose parameters are fp32, to its start, which changes nothing."""

    @abstractmethod
    def change(self, layer: Any) -> "Change":
        """Return what an added layer does to its weight, on the CPU in fp32 and independent of the layer."""

    def blocks(self, pipe: "DiffusionPipeline") -> Collection[str] | None:
        """Return the modules of the UNet that its layers must lie in, or None for anywhere."""
        return None

    @property
    def rank_room(self) -> int:
        """How many times the rank must fit into the smaller side of a layer; 0: any number of times."""
        return 0

    def rate_factors(self) -> Mapping[str, float]:
        """Return by role what the learning rate is multiplied by, where that is not 1."""
        return {}

    def facts(self) -> Mapping[str, str]:
        """Return metadata about the method's options."""
        return {}

    @property
    def added(self) -> "AddedLayers":
        """The layers, once the method is prepared."""
        assert self._added is not None
        return self._added

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Add the layers to the base and return their parameters by component and learning rate.

        Raises:
            TrainingError: If the rank is too large for a layer, a part of a name matches nothing, nothing is
                left to train, or the pipeline has layers of peft already.
        """
        from studio.trainers.added_layers import AddedLayers

        assert isinstance(spec.options, self.Options)
        self.options, self.seed = spec.options, spec.seed
        self._added = AddedLayers(pipe, self)
        return self._added.groups(spec)

    def export(self) -> "Adapter":
        """Return the adapter as it is now."""
        from studio.adapters.adapter import Adapter

        return Adapter(
            name=self.kind, kind=self.kind, changes=self.added.changes(), metadata=dict(self.facts())
        )

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context without the layers."""
        return self.added.suspended()

    def release(self) -> None:
        """Take the layers out again; may be called at any time."""
        if self._added is not None:
            self._added.remove()


def inject(module: "nn.Module", configs: Iterable[Any], *, name: str = PEFT_NAME) -> None:
    """Put peft's layers into a network by configurations of which each names the layers it is for.

    Args:
        module: The network.
        configs: peft's, of any kind.
        name: peft's name of the adapter.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    for config in configs:
        # peft marks the network, and warns of layers that it added a moment ago.
        vars(module).pop("peft_config", None)
        # Its function for this refuses VeRA, whose layers themselves keep the matrices that they share.
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](module, config, name)


def grouped_by(layers: Iterable[str], key: Callable[[str], int]) -> dict[int, list[str]]:
    """Return the layers' names by a number that each of them has."""
    groups: dict[int, list[str]] = {}
    for name in layers:
        groups.setdefault(key(name), []).append(name)
    return groups


def copied(tensor: "Tensor") -> "Tensor":
    """Return a tensor of its own, fp32 on the CPU."""
    import torch

    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True)
