"""The base's own parameters, trained in fp32 copies that take their memory's place for a while."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Change
from studio.adapters.kinds.full import FullChange
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.errors import TrainingError
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup
from studio.trainers.borrow import refuse_adapters
from studio.trainers.targets import by_name


class FullParameters:
    """Chosen parameters of a pipeline, all of a layer's: weight, bias, norm.

    The parameter objects stay; what they hold is swapped, so the base's tensors are never written to.

    Args:
        pipe: The base; its parameters must be frozen.
        blocks: Parts of names of layers that learn, see ``by_name``; all where there are none.
        exclude: Parts of names of layers left out.
        text_encoders: Whether those learn, too. Not their embeddings: adapter files have no names for these.

    Raises:
        TrainingError: If the pipeline has layers of peft, a part matches nothing, or nothing is left.
    """

    def __init__(
        self, pipe: Any, *, blocks: Collection[str], exclude: Collection[str], text_encoders: bool
    ) -> None:
        refuse_adapters(pipe)
        components = components_of(pipe)
        names = [name for name in canonical_names(components) if _trainable(name, text_encoders)]
        chosen = _chosen(names, blocks, exclude)
        self._parameters = {name: find_parameter(components, name) for name in chosen}
        self._own = {name: parameter.data for name, parameter in self._parameters.items()}
        self._trained = {name: own.to(dtype=torch.float32, copy=True) for name, own in self._own.items()}
        self.attach()

    @property
    def aside(self) -> list[Tensor]:
        """The base's own tensors, which are kept."""
        return list(self._own.values())

    def attach(self) -> None:
        """Put the copies in place, to be trained."""
        for name, parameter in self._parameters.items():
            parameter.data = self._trained[name]
            parameter.requires_grad_(True)

    def detach(self) -> None:
        """Put the base's own tensors back in place, frozen."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = self._own[name]
            parameter.requires_grad_(False)

    def groups(self, spec: TrainSpec) -> list[ParameterGroup]:
        """Return the parameters by component."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            found.setdefault(name.split(".", 1)[0], []).append(parameter)
        return [
            ParameterGroup(
                component,
                parameters,
                spec.unet_learning_rate if component == "unet" else spec.encoder_learning_rate,
            )
            for component, parameters in found.items()
        ]

    def changes(self) -> dict[str, Change]:
        """Return the differences to the base, fp32 on the CPU."""
        return {name: FullChange(self._difference(name)) for name in self._parameters}

    def _difference(self, name: str) -> Tensor:
        own = self._own[name]
        return (self._trained[name].detach() - own.float()).cpu()


def _trainable(name: str, text_encoders: bool) -> bool:
    component = name.split(".", 1)[0]
    return component == "unet" or (text_encoders and ".embeddings." not in name and ".text_model." in name)


def _chosen(names: list[str], blocks: Collection[str], exclude: Collection[str]) -> list[str]:
    layers: dict[str, list[str]] = {}
    for name in names:
        component, _, path = name.partition(".")
        layers.setdefault(component, []).append(path)
    wanted = by_name(layers, dict.fromkeys(blocks, True), option="blocks") if blocks else dict.fromkeys(names)
    left_out = by_name(layers, dict.fromkeys(exclude, True), option="exclude")
    chosen = [name for name in names if name in wanted and name not in left_out]
    if not chosen:
        raise TrainingError("no layer is left to train. Choose more blocks or exclude fewer layers.")
    return chosen
