"""Kohya's key names, which most tools read: ``lora_unet_<path>.lora_down.weight``, ``lora_te_...``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, cast

from studio.adapters.names import kohya_module, kohya_table
from studio.registry import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter, KindOfChange

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


class Kohya:
    """SD 1 and 2 under diffusers' module names, SDXL under SGM's; one alpha in the whole file."""

    def recognises(self, keys: Collection[str]) -> bool:
        """Say whether most of the keys begin with one of kohya's prefixes."""
        return 2 * sum(key.startswith(_PREFIXES) for key in keys) > len(keys)

    def split(self, key: str) -> tuple[str, str] | None:
        """Return module and part; the first dot divides them."""
        module, _, part = key.partition(".")
        return (module, part) if part and module.startswith(_PREFIXES) else None

    def table(self, names: Collection[str]) -> Mapping[str, str]:
        """Return the canonical module by kohya's key."""
        return kohya_table(names)

    def alphas(self, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> Mapping[str, float]:
        """Return nothing: alpha is a tensor here."""
        return {}

    def write(self, adapter: Adapter, *, family: str | None) -> tuple[dict[str, Tensor], float]:
        """Return the tensors, all with the alpha that most changes have.

        diffusers 0.42 applies a wrong scale to attention layers when alphas differ within a file, so the
        others are folded into ``lora_up``. Ranks may differ.
        """
        changes = cast("Mapping[str, KindOfChange]", adapter.changes)
        alphas = Counter(change.alpha for change in changes.values() if change.alpha is not None)
        alpha = alphas.most_common(1)[0][0] if alphas else 1.0
        tensors: dict[str, Tensor] = {}
        for name, change in changes.items():
            module = kohya_module(name.rpartition(".")[0], sdxl=family == "sdxl")
            for part, tensor in change.to_parts(alpha=alpha).items():
                tensors[f"{module}.{part}"] = tensor
        return tensors, alpha


FORMATS.register("kohya")(Kohya())
