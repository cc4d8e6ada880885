"""Diffusers' key names: ``unet.<path>.lora_A.weight``, as peft spells it, and older spellings for reading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from studio.adapters.kinds.dora import DoraChange
from studio.adapters.kinds.lokr import LokrChange
from studio.adapters.names import modules_of
from studio.registry import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter

_PARTS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "alpha": "alpha",
    # Read by single models' load_lora_adapter, not by pipelines.
    **{part: part for part in LokrChange.optional},
}
_PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down\.weight|up\.weight|alpha)")
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.")
# Files of single UNets name no component.
_BARE_UNET = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in.",
    "conv_out.",
    "time_embedding.",
    "add_embedding.",
)


class Diffusers:
    """What ``load_lora_weights`` reads. It has no tensor for alpha: the scale is folded into ``lora_B``."""

    bound_to_base = False

    def recognises(self, keys: Collection[str]) -> bool:
        """Say whether most of the keys are of this format."""
        return 2 * sum(self.split(key) is not None for key in keys) > len(keys)

    def split(self, key: str) -> tuple[str, str] | None:
        """Return module and part, in any of the spellings."""
        if key.startswith(_BARE_UNET):
            key = f"unet.{key}"
        if not key.startswith(_COMPONENTS):
            return None
        if match := _PROCESSOR.fullmatch(key):
            attention, layer, part = match.groups()
            module = f"{attention}.to_{layer}" + (".0" if layer == "out" else "")
            return module, part if part == "alpha" else f"lora_{part}"
        for ending, part in _PARTS.items():
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), part
        # An unknown ending after the module's name, for instance of another kind of adapter.
        module, dot, part = key.rpartition(".lora_")
        return (module, f"lora_{part}") if dot else None

    def table(self, names: Collection[str]) -> Mapping[str, str]:
        """Return canonical modules by themselves and, for text encoders, without ``text_model.`` too."""
        modules = modules_of(names)
        short = {
            module.replace(".text_model.", ".", 1): module for module in modules if ".text_model." in module
        }
        return short | {module: module for module in modules}

    def complete(
        self, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors with the alphas of ``lora_adapter_metadata``, peft's configuration in JSON.

        Raises:
            ValueError: If it is not JSON of that form, or asks for what the tensors cannot say.
        """
        import torch

        config = _config(metadata)
        completed = {}
        for module, given in modules.items():
            parts = dict(given)
            if "dora_scale" in parts:
                # One per output: peft has an axis before them for convolutions.
                parts["dora_scale"] = parts["dora_scale"].flatten()
            elif config.get(f"{module.partition('.')[0]}.use_dora"):
                raise ValueError(f"its metadata says that it is a DoRA, but '{module}' has no magnitudes")
            down = parts.get("lora_down.weight")
            alpha = None if down is None or not down.ndim else _alpha(config, module, rank=down.shape[0])
            if alpha is not None:
                parts["alpha"] = torch.tensor(alpha, dtype=torch.float64)
            completed[module] = parts
        return completed

    def write(
        self, adapter: Adapter, *, family: str | None, names: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the tensors; alpha counts as equal to the rank.

        Raises:
            ValueError: If diffusers would refuse a change or make another of it.
        """
        doras = [name for name, change in adapter.changes.items() if isinstance(change, DoraChange)]
        if 0 < len(doras) < len(adapter.changes):
            raise ValueError(
                "diffusers takes all layers of a file for DoRA or none, and here some are; choose kohya"
            )
        tensors: dict[str, Tensor] = {}
        for name, change in adapter.changes.items():
            low_rank = change.direction if isinstance(change, DoraChange) else change
            pair = low_rank.low_rank()
            if pair is None:
                raise ValueError(
                    f"diffusers reads LoRA and DoRA only, '{name}' is neither; choose kohya, or write the "
                    "whole model with 'studio convert --into-base'"
                )
            module = name.rpartition(".")[0]
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pair
            if isinstance(change, DoraChange):
                # peft's own files leave out the ending; transformers' loader of text encoders wants it.
                ending = "" if module.startswith("unet.") else ".weight"
                tensors[f"{module}.lora_magnitude_vector{ending}"] = _magnitude(name, change)
        return tensors, float(
            max(tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight"))
        )


def _magnitude(name: str, change: DoraChange) -> Tensor:
    """Return the magnitudes in peft's shape: ``[out]``, or ``[1, out, 1, 1]`` for a convolution."""
    if change.per_input:
        raise ValueError(
            f"diffusers knows one magnitude per output, '{name}' has one per input; choose kohya"
        )
    axes = (1, -1, 1, 1) if len(change.shape) == 4 else (-1,)
    return change.magnitude.reshape(axes)


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("lora_adapter_metadata in its metadata is not a JSON object")
    return config


def _alpha(config: Mapping[str, Any], module: str, *, rank: int) -> float | None:
    """Return the alpha that peft's configuration gives a module, or None if it says nothing."""
    component, _, path = module.partition(".")
    alpha = _pattern(config.get(f"{component}.alpha_pattern"), path)
    alpha = config.get(f"{component}.lora_alpha") if alpha is None else alpha
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"lora_adapter_metadata gives '{module}' the alpha {alpha!r}, a number was expected")
    # Rank-stabilised LoRA scales by alpha / sqrt(rank), arXiv:2312.03732 Theorem 3.2.
    return alpha * math.sqrt(rank) if config.get(f"{component}.use_rslora") else float(alpha)


def _pattern(patterns: Any, path: str) -> Any:
    """Return the value of the first key that names the module, whole or by its end.

    The keys are regular expressions to peft. A file from a stranger gets no such power: they are compared as
    text.
    """
    if patterns is None:
        return None
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern in lora_adapter_metadata is not a JSON object")
    for key, value in patterns.items():
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if path == plain or (not key.startswith("^") and path.endswith(f".{plain}")):
            return value
        if re.search(r"[\\*+?()\[\]{}|]", plain):
            raise ValueError(f"alpha_pattern in lora_adapter_metadata is not a plain name: {key[:80]!r}")
    return None


FORMATS.register("diffusers")(Diffusers())
