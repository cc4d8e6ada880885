"""Layers with parameters of their own around the base's, put in their places and taken out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from studio.adapters.adapter import Change
from studio.data.batches import derived_seed
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup
from studio.trainers.borrow import networks, refuse_adapters
from studio.trainers.layer_method import LayerMethod, RankOptions
from studio.trainers.targets import by_name, canonical_name, check_ranks, target_layers


class AddedLayers:
    """The layers that a method adds to a pipeline, whose own layers stay untouched inside of them.

    Args:
        pipe: The base; its parameters must be frozen.
        method: Says what the layers are; its options which ones get them, its seed how they start.

    Raises:
        TrainingError: If the pipeline has layers of peft already, or the options do not fit it.
    """

    def __init__(self, pipe: DiffusionPipeline, method: LayerMethod) -> None:
        refuse_adapters(pipe)
        self._method = method
        self._originals = self._chosen(pipe)
        self._modules = {name: networks(pipe)[name] for name in self._originals}
        self._rates = by_name(
            self._originals, method.options.block_learning_rates, option="block_learning_rates"
        )
        ranks = self._ranks()
        self._layers: dict[str, dict[str, Any]] = {}
        try:
            for component, originals in self._originals.items():
                module, prefix = self._modules[component], f"{component}."
                if originals:
                    method.add(
                        module,
                        originals,
                        {name: ranks[prefix + name] for name in originals if prefix + name in ranks},
                    )
                self._layers[component] = {name: module.get_submodule(name) for name in originals}
            self._start()
        except BaseException:
            self.remove()
            raise

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Go through component, module name and added layer."""
        for component, layers in self._layers.items():
            for name, layer in layers.items():
                yield component, name, layer

    def groups(self, spec: TrainSpec) -> list[ParameterGroup]:
        """Return the trained parameters by component and learning rate."""
        factors = self._method.rate_factors()
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for component, name, layer in self:
            own = spec.unet_learning_rate if component == "unet" else spec.encoder_learning_rate
            rate = self._rates.get(f"{component}.{name}", own)
            for role, parameter in self._method.parameters(layer).items():
                groups.setdefault((component, rate * factors.get(role, 1.0)), []).append(parameter)
        return [ParameterGroup(component, found, rate) for (component, rate), found in groups.items()]

    def changes(self) -> dict[str, Change]:
        """Return what the layers do as they are now, under canonical names."""
        return {
            canonical_name(component, name): self._method.change(layer) for component, name, layer in self
        }

    def remove(self) -> None:
        """Put the pipeline's own layers back in their places; the same objects that stood there."""
        for component, originals in self._originals.items():
            module = self._modules[component]
            _place(module, originals)
            # peft marks the module it worked on, by which others would believe that adapters are loaded.
            vars(module).pop("peft_config", None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take the layers out for the length of a block."""
        self.remove()
        try:
            yield
        finally:
            for component, layers in self._layers.items():
                _place(self._modules[component], layers)

    def _chosen(self, pipe: DiffusionPipeline) -> dict[str, dict[str, nn.Module]]:
        options = self._method.options
        return target_layers(
            pipe,
            targets=options.targets,
            exclude=options.exclude,
            text_encoders=options.train_text_encoder,
            blocks=self._method.blocks(pipe),
        )

    def _ranks(self) -> dict[str, int]:
        """Return the rank of each layer by component and module name; nothing for methods without ranks."""
        options = self._method.options
        if not isinstance(options, RankOptions):
            return {}
        own = by_name(self._originals, options.block_ranks, option="block_ranks")
        names = [f"{component}.{name}" for component, layers in self._originals.items() for name in layers]
        ranks = {name: own.get(name, options.rank) for name in names}
        check_ranks(self._originals, ranks, times=self._method.rank_room)
        return ranks

    def _start(self) -> None:
        """Make all parameters that were added fp32 and those that are trained trainable, and set the start.

        It depends on the seed and the layer alone.
        """
        for component, name, layer in self:
            # New layers are in training mode, and the base may not be.
            layer.train(layer.base_layer.training)
            base = set(layer.base_layer.parameters())
            for parameter in layer.parameters():
                if parameter not in base:
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(False)
            for parameter in self._method.parameters(layer).values():
                parameter.requires_grad_(True)
            seed = derived_seed(self._method.seed, component, name, "start")
            with torch.no_grad():
                self._method.start(layer, generator=torch.Generator().manual_seed(seed))


def _place(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)
