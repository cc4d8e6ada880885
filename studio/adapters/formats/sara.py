"""The studio's own files of sparse changes: ``<parameter>.gaps``, ``.delta`` and ``.shape``.

The reference program (SaRA, arXiv:2409.06633) pickles values without indices or names and finds their places
again from the base's smallest weights. Here each parameter is named as in diffusers, places are written, and
the values are differences, so that they add, scale and survive another precision of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.names import modules_of
from studio.registry import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter

_ENDINGS = tuple(f".{part}" for part in SparseChange.optional)


class Sara:
    """Sparse changes under the names of their parameters, for the base that they were trained on."""

    bound_to_base = True

    def recognises(self, keys: Collection[str]) -> bool:
        """Say whether most of the keys are of this format."""
        return 2 * sum(key.endswith(_ENDINGS) for key in keys) > len(keys)

    def split(self, key: str) -> tuple[str, str] | None:
        """Return module and part; the last two words are the part."""
        module, *part = key.rsplit(".", 2)
        return (module, ".".join(part)) if key.endswith(_ENDINGS) else None

    def table(self, names: Collection[str]) -> Mapping[str, str]:
        """Return canonical modules by themselves."""
        return {module: module for module in modules_of(names)}

    def complete(
        self, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors as they are: these files say everything in them."""
        return modules

    def write(
        self, adapter: Adapter, *, family: str | None, names: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the tensors of all parameters of which an entry changes.

        Raises:
            ValueError: If a change is not sparse, or none changes anything.
        """
        tensors: dict[str, Tensor] = {}
        for name, change in adapter.changes.items():
            if not isinstance(change, SparseChange):
                raise ValueError(f"it holds sparse changes only, that of '{name}' is none; choose kohya")
            if change.indices.numel():
                module, _, parameter = name.rpartition(".")
                parts = change.to_parts(alpha=1.0, parameter=parameter)
                tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        if not tensors:
            raise ValueError("no entry changes")
        return tensors, 1.0


FORMATS.register("sara")(Sara())
