"""Which of the base's layers get an adapter, and what the user says about some of them by name."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Literal, TypeVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from studio.errors import TrainingError
from studio.models.quantization import weight_shape
from studio.registry import nearest

Targets = Literal["attention", "attention+ff", "all"]
Layers = Mapping[str, Mapping[str, nn.Module]]
"""Layers by component and module name."""

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".*\.ff\.net\.(0\.proj|2)"
# Everything inside transformers, residual blocks and samplers: layers outside of them (conv_in, conv_out,
# the time and size embeddings) cannot be reached by other tools' loaders.
BLOCKS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\..*"
UNET_TARGETS = {"attention": ATTENTION, "attention+ff": f"{ATTENTION}|{FEED_FORWARD}", "all": BLOCKS}

TEXT_ATTENTION = r".*encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"
TEXT_ALL = rf"{TEXT_ATTENTION}|.*encoder\.layers\.\d+\.mlp\.fc[12]"
TEXT_TARGETS = {"attention": TEXT_ATTENTION, "attention+ff": TEXT_ALL, "all": TEXT_ALL}

V = TypeVar("V")


def target_layers(
    pipe: DiffusionPipeline,
    *,
    targets: Targets,
    exclude: Collection[str],
    text_encoders: bool,
    blocks: Collection[str] | None = None,
) -> dict[str, dict[str, nn.Module]]:
    """Return by component the linear layers and convolutions to train under their module names.

    Args:
        pipe: The base.
        targets: Which kinds of layers.
        exclude: Parts of names, see ``by_name``.
        text_encoders: Whether those are looked through, too.
        blocks: Modules of the UNet that its layers must lie in; None for anywhere.

    Raises:
        TrainingError: If an exclusion matches no layer or nothing is left.
    """
    components: dict[str, nn.Module] = {"unet": pipe.unet}
    if text_encoders:
        encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
        components |= {name: encoder for name, encoder in encoders.items() if encoder is not None}
    found: dict[str, dict[str, nn.Module]] = {}
    for component, module in components.items():
        pattern = re.compile((UNET_TARGETS if component == "unet" else TEXT_TARGETS)[targets])
        found[component] = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and pattern.fullmatch(name)
        }
    if blocks is not None:
        inside = tuple(f"{block}." for block in blocks)
        found["unet"] = {name: layer for name, layer in found["unet"].items() if name.startswith(inside)}
    excluded = by_name(found, dict.fromkeys(exclude, True), option="exclude")
    kept = {
        component: {name: layer for name, layer in layers.items() if not excluded.get(f"{component}.{name}")}
        for component, layers in found.items()
    }
    if not any(kept.values()):
        raise TrainingError(f"no layer is left to train with targets '{targets}'. Exclude fewer layers.")
    return kept


def by_name(layers: Mapping[str, Collection[str]], values: Mapping[str, V], *, option: str) -> dict[str, V]:
    """Return what the user says of single layers, by component and module name joined by a dot.

    Args:
        layers: Names of those that there are by component.
        values: By one or more whole parts of a name in a row: ``down_blocks.0``, ``attn1``, ``text_encoder``.
            Where several match a layer, the last counts.
        option: What the user calls this.

    Raises:
        TrainingError: If one matches no layer; names the most similar part that there is.
    """
    names = [f"{component}.{name}" for component, found in layers.items() for name in found]
    unused = [part for part in values if not any(within(part, name) for name in names)]
    if unused:
        similar = nearest(unused[0], parts_of(names, length=unused[0].count(".") + 1))
        example = f" Layers are called like '{names[0]}'." if names else ""
        raise TrainingError(f"{option} matches no layer: {', '.join(map(repr, unused))}.{similar}{example}")
    return {name: value for part, value in values.items() for name in names if within(part, name)}


def check_ranks(layers: Layers, ranks: Mapping[str, int], *, times: int = 1) -> None:
    """Check that no rank is larger than the smaller side of its layer.

    Args:
        layers: To be trained.
        ranks: By component and module name.
        times: How many ranks the method needs room for.

    Raises:
        TrainingError: If one is; names the smallest such layer and its limit.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for component, found in layers.items():
        for name, layer in found.items():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            out_size, *inner = weight_shape(weight)
            sizes[f"{component}.{name}"] = (out_size, math.prod(inner))
    small = {name: size for name, size in sizes.items() if min(size) < ranks[name] * times}
    if not small:
        return
    name, (out_size, in_size) = min(small.items(), key=lambda item: min(item[1]))
    others = f" {len(small) - 1} more layers are smaller than their rank, too." if len(small) > 1 else ""
    raise TrainingError(
        f"rank must be at most {min(out_size, in_size) // times} for '{name}' ({out_size} x {in_size}), got "
        f"{ranks[name]}. Lower rank or exclude the layer.{others}"
    )


def canonical_name(component: str, module_name: str) -> str:
    """Return the canonical name of a layer's weight: in text encoders always with ``text_model.``."""
    if component != "unet" and not module_name.startswith("text_model."):
        module_name = f"text_model.{module_name}"
    return f"{component}.{module_name}.weight"


def within(part: str, name: str) -> bool:
    """Say whether the words of ``part`` stand in a row in ``name``: "layers.1" does not in "layers.11"."""
    return f".{part}." in f".{name}."


def parts_of(names: Collection[str], *, length: int) -> list[str]:
    """Return all runs of so many words in the names."""
    runs: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        runs |= {".".join(words[first : first + length]): None for first in range(len(words) - length + 1)}
    return list(runs)
