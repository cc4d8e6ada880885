"""Diffusers' key names: ``unet.<path>.lora_A.weight``, as peft spells it, and older spellings for reading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

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
    "alpha": "alpha",
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

    def alphas(self, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> Mapping[str, float]:
        """Return alpha by module as ``lora_adapter_metadata`` has it, peft's configuration in JSON.

        Raises:
            ValueError: If it is not JSON of that form, or asks for what plain factors cannot say.
        """
        if "lora_adapter_metadata" not in metadata:
            return {}
        try:
            config = json.loads(metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ValueError("lora_adapter_metadata in its metadata is not a JSON object")
        found = {}
        for module, rank in ranks.items():
            component, _, path = module.partition(".")
            if config.get(f"{component}.use_dora"):
                raise ValueError("it is a DoRA, which changes more than the low-rank factors say")
            alpha = _pattern(config.get(f"{component}.alpha_pattern"), path)
            alpha = config.get(f"{component}.lora_alpha") if alpha is None else alpha
            if alpha is None:
                continue
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(
                    f"lora_adapter_metadata gives '{module}' the alpha {alpha!r}, a number was expected"
                )
            # Rank-stabilised LoRA scales by alpha / sqrt(rank), arXiv:2312.03732 Theorem 3.2.
            found[module] = alpha * math.sqrt(rank) if config.get(f"{component}.use_rslora") else float(alpha)
        return found

    def write(self, adapter: Adapter, *, family: str | None) -> tuple[dict[str, Tensor], float]:
        """Return the tensors; alpha counts as equal to the rank."""
        tensors: dict[str, Tensor] = {}
        for name, change in adapter.changes.items():
            pair = change.low_rank()
            if pair is None:
                raise ValueError(f"diffusers reads low-rank changes only, '{name}' is none")
            module = name.rpartition(".")[0]
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pair
        return tensors, float(
            max(tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight"))
        )


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
