"""Kohya's key names, which most tools read: ``lora_unet_<path>.lora_down.weight``, ``lora_te_...``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, cast

from studio.adapters.kinds.full import FullChange, parts_of_module
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.names import SDXL_LAYOUT, kohya_module, kohya_table, layout_of, reference_names
from studio.registry import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter, KindOfChange

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


class Kohya:
    """SD 1 and 2 under diffusers' module names, SDXL under SGM's; one alpha in the whole file."""

    bound_to_base = False

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

    def complete(
        self, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors as they are: these files say everything in them."""
        return modules

    def write(
        self, adapter: Adapter, *, family: str | None, names: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the tensors, all with the alpha that most changes have; sparse changes become dense ones.

        diffusers 0.42 applies a wrong scale to attention layers when alphas differ within a file, so the
        others are folded into ``lora_up``. Ranks may differ.
        """
        import torch

        changes = cast("Mapping[str, KindOfChange]", adapter.changes)
        alphas = Counter(change.alpha for change in changes.values() if change.alpha is not None)
        # As files hold it, in fp32: folding the others by more digits would not be undone when read.
        alpha = float(torch.tensor(alphas.most_common(1)[0][0] if alphas else 1.0))
        layout = layout_of(names) if names else SDXL_LAYOUT
        tensors: dict[str, Tensor] = {}
        dense: dict[str, dict[str, Tensor]] = {}
        for name, change in changes.items():
            module, _, parameter = name.rpartition(".")
            if isinstance(change, FullChange | SparseChange):
                dense.setdefault(module, {})[parameter] = _dense(change)
                continue
            key = kohya_module(module, sdxl=family == "sdxl", layout=layout)
            for part, tensor in change.to_parts(alpha=alpha).items():
                tensors[f"{key}.{part}"] = tensor
        for module, deltas in dense.items():
            key = kohya_module(module, sdxl=family == "sdxl", layout=layout)
            shape = _weight_shape(module, deltas, names, family=family)
            for part, tensor in parts_of_module(deltas, weight=shape).items():
                tensors[f"{key}.{part}"] = tensor
        written = Counter(float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha"))
        return tensors, written.most_common(1)[0][0] if written else alpha


def _dense(change: FullChange | SparseChange) -> Tensor:
    """Return the values of a change that does not depend on the base's, in the type that it has them in."""
    import torch

    if isinstance(change, FullChange):
        return change.values
    return change.delta(torch.empty(change.shape), weight=1.0).to(change.values.dtype)


def _weight_shape(
    module: str, deltas: Mapping[str, Tensor], names: Mapping[str, tuple[int, ...]], *, family: str | None
) -> tuple[int, ...]:
    """Return the shape of a module's weight, of which perhaps only the bias changes.

    Raises:
        ValueError: If nothing tells.
    """
    if "weight" in deltas:
        return tuple(deltas["weight"].shape)
    names = names or (reference_names(family) if family else {})
    if names.get(f"{module}.bias") == tuple(deltas["bias"].shape):
        return names[f"{module}.weight"]
    raise ValueError(
        f"of '{module}' only the bias changes, and such files state its weight too; give the base, which "
        "knows the weight's shape"
    )


FORMATS.register("kohya")(Kohya())
