"""Which layers LoRA trains, and peft's layers put in their places and taken out again."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.data.batches import derived_seed
from studio.errors import TrainingError
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup
from studio.trainers.methods.lora import LoraOptions

PEFT_NAME = "studio"
"""peft's name of the adapter in its layers."""

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
# Everything inside transformers, residual blocks and samplers: layers outside of them (conv_in, conv_out,
# the time and size embeddings) cannot be reached by other tools' loaders.
BLOCKS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\..*"
UNET_TARGETS = {"attention": ATTENTION, "attention+ff": f"{ATTENTION}|{FEED_FORWARD}", "all": BLOCKS}

TEXT_ATTENTION = r".*encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"
TEXT_ALL = rf"{TEXT_ATTENTION}|.*encoder\.layers\.\d+\.mlp\.fc[12]"
TEXT_TARGETS = {"attention": TEXT_ATTENTION, "attention+ff": TEXT_ALL, "all": TEXT_ALL}


def target_layers(pipe: DiffusionPipeline, options: LoraOptions) -> dict[str, dict[str, nn.Module]]:
    """Return by component the layers to train under their module names.

    Raises:
        TrainingError: If an exclusion matches no layer, nothing is left, or the rank is too large for a
            layer.
    """
    components: dict[str, nn.Module] = {"unet": pipe.unet}
    if options.train_text_encoder:
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
        components |= {name: encoder for name, encoder in encoders.items() if encoder is not None}
    found: dict[str, dict[str, nn.Module]] = {}
    for component, module in components.items():
        pattern = re.compile((UNET_TARGETS if component == "unet" else TEXT_TARGETS)[options.targets])
        found[component] = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and pattern.fullmatch(name)
        }
    kept = _without(found, options.exclude)
    if not any(kept.values()):
        raise TrainingError(
            f"no layer is left to train with targets '{options.targets}'. Exclude fewer layers."
        )
    _check_rank(
        {
            f"{component}.{name}": layer
            for component, layers in kept.items()
            for name, layer in layers.items()
        },
        options.rank,
    )
    return kept


class LoraLayers:
    """peft's LoRA layers in a pipeline whose own layers stay untouched inside of them.

    Args:
        pipe: The base; its parameters must be frozen.
        options: Of the method.
        seed: Of the start of the down matrices; the up matrices start at zero.

    Raises:
        TrainingError: As ``target_layers``, and if the pipeline has layers of peft already.
    """

    def __init__(self, pipe: DiffusionPipeline, options: LoraOptions, *, seed: int) -> None:
        self._options = options
        self._scale_alpha = float(options.rank if options.alpha is None else options.alpha)
        components: dict[str, nn.Module] = {
            name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)
        }
        if any(isinstance(layer, BaseTunerLayer) for part in components.values() for layer in part.modules()):
            raise TrainingError(
                "the pipeline has peft adapters loaded. Call pipe.unload_lora_weights() before training."
            )
        self._originals = target_layers(pipe, options)
        self._components = {name: components[name] for name in self._originals}
        self._layers: dict[str, dict[str, LoraLayer]] = {}
        try:
            for component, layers in self._originals.items():
                self._layers[component] = self._inject(self._components[component], layers)
        except BaseException:
            self.remove()
            raise
        self._start(seed)

    def groups(self, spec: TrainSpec) -> list[ParameterGroup]:
        """Return the trainable parameters by component with their learning rates."""
        text_rate = spec.text_encoder_learning_rate or spec.learning_rate / 2
        return [
            ParameterGroup(
                component,
                [matrix for layer in layers.values() for matrix in _matrices(layer)],
                spec.learning_rate if component == "unet" else text_rate,
            )
            for component, layers in self._layers.items()
            if layers
        ]

    def export(self) -> Adapter:
        """Return the adapter as it is now: fp32 on the CPU, under canonical names."""
        changes = {}
        for component, layers in self._layers.items():
            for name, layer in layers.items():
                down, up = (matrix.detach().float().cpu().clone() for matrix in _matrices(layer))
                changes[canonical_name(component, name)] = LoraChange(down, up, self._scale_alpha)
        metadata = {
            "ss_network_dim": str(self._options.rank),
            "ss_network_alpha": f"{self._scale_alpha:g}",
            "ss_network_dropout": f"{self._options.dropout:g}",
        }
        return Adapter(name="lora", kind="lora", changes=changes, metadata=metadata)

    def remove(self) -> None:
        """Put the pipeline's own layers back in their places; the same objects that stood there."""
        for component, originals in self._originals.items():
            module = self._components[component]
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
                _place(self._components[component], layers)

    def _inject(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, LoraLayer]:
        if not layers:
            return {}
        config = LoraConfig(
            r=self._options.rank,
            lora_alpha=self._scale_alpha,
            lora_dropout=self._options.dropout,
            target_modules=list(layers),
        )
        inject_adapter_in_model(config, module, PEFT_NAME)
        placed: dict[str, LoraLayer] = {}
        for name in layers:
            layer = module.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            placed[name] = layer
        return placed

    def _start(self, seed: int) -> None:
        """Draw the down matrices as nn.Linear would, from the seed alone; fp32 whatever the base's dtype."""
        for component, layers in self._layers.items():
            for name, layer in layers.items():
                for matrix in _matrices(layer):
                    matrix.data = matrix.data.float()
                    matrix.requires_grad_(True)
                generator = torch.Generator().manual_seed(derived_seed(seed, component, name, "start"))
                down, up = _matrices(layer)
                drawn = torch.empty(down.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                down.data.copy_(drawn)
                up.data.zero_()


def canonical_name(component: str, module_name: str) -> str:
    """Return the canonical name of a layer's weight: in text encoders always with ``text_model.``."""
    if component != "unet" and not module_name.startswith("text_model."):
        module_name = f"text_model.{module_name}"
    return f"{component}.{module_name}.weight"


def _matrices(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    down, up = layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight
    assert isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)
    return down, up


def _place(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)


def _without(
    found: Mapping[str, Mapping[str, nn.Module]], exclude: tuple[str, ...]
) -> dict[str, dict[str, nn.Module]]:
    names = [f"{component}.{name}" for component, layers in found.items() for name in layers]
    unused = [part for part in exclude if not any(part in name for name in names)]
    if unused:
        example = f" Layers are called like '{names[0]}'." if names else ""
        raise TrainingError(f"exclude matches no layer: {', '.join(map(repr, unused))}.{example}")
    return {
        component: {
            name: layer
            for name, layer in layers.items()
            if not any(part in f"{component}.{name}" for part in exclude)
        }
        for component, layers in found.items()
    }


def _check_rank(layers: Mapping[str, nn.Module], rank: int) -> None:
    sizes: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        sizes[name] = (weight.shape[0], math.prod(weight.shape[1:]))
    small = {name: size for name, size in sizes.items() if min(size) < rank}
    if not small:
        return
    name, (out_size, in_size) = min(small.items(), key=lambda item: min(item[1]))
    others = f" {len(small) - 1} more layers are smaller than this rank, too." if len(small) > 1 else ""
    raise TrainingError(
        f"rank must be at most {min(out_size, in_size)} for '{name}' ({out_size} x {in_size}), got {rank}. "
        f"Lower rank or exclude the layer.{others}"
    )
