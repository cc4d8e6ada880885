"""Dense changes: a number for every entry of a parameter, as LyCORIS and ComfyUI name them.

    delta = diff

Files hold them by module: ``diff`` and ``diff_b`` for weight and bias of a linear layer or convolution,
``w_norm`` and ``b_norm`` for those of a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.adapter import interchangeable
from studio.registry import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LAYER = {"weight": "diff", "bias": "diff_b"}
_NORM = {"weight": "w_norm", "bias": "b_norm"}


@KINDS.register("full")
@dataclass(frozen=True, eq=False)
class FullChange:
    """A change of every entry of one parameter: weight, bias, norm or kernel.

    Attributes:
        values: What is added at weight 1, floating, of the parameter's shape.

    Raises:
        ValueError: If it is the change of no parameter; the text says what, got and wanted.
    """

    values: Tensor

    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset({*_LAYER.values(), *_NORM.values()})

    def __post_init__(self) -> None:
        if not self.values.is_floating_point():
            raise ValueError(f"the values are {self.values.dtype}, a floating type was expected")
        if not self.values.ndim or not self.values.numel():
            raise ValueError(f"{list(self.values.shape)} is the shape of no parameter")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        return tuple(self.values.shape)

    @property
    def alpha(self) -> None:
        """Nothing: the values are the change itself."""
        return None

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight * values``, fp32, of the base's shape and on its device."""
        return (weight * self.values.to(base.device).float()).reshape(base.shape)

    def low_rank(self) -> None:
        """Return None: the change has in general full rank."""
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, FullChange]:
        """Return the changes of a module's parameters; zeros that only stand beside another change are none.

        Raises:
            ValueError: If the parts are not those of one layer or norm.
        """
        names = _NORM if parts.keys() & set(_NORM.values()) else _LAYER
        if parts.keys() - set(names.values()):
            raise ValueError(f"{', '.join(sorted(parts))} belong to a layer and to a norm, not to one module")
        found = {parameter: parts[part] for parameter, part in names.items() if part in parts}
        sizes = " and ".join(f"{names[parameter]} {list(found[parameter].shape)}" for parameter in found)
        axes = {"bias": (1,), "weight": (1,) if names is _NORM else (1, 2, 4)}
        if any(tensor.ndim not in axes[parameter] for parameter, tensor in found.items()):
            raise ValueError(f"{sizes} are of no linear layer, convolution or norm")
        if len({tensor.shape[0] for tensor in found.values()}) > 1:
            raise ValueError(f"{sizes} differ in the number of outputs")
        changes = {parameter: cls(tensor) for parameter, tensor in found.items()}
        return {name: change for name, change in changes.items() if change.values.any()} or changes

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the parts to write for the change of a weight."""
        return parts_of_module({"weight": self.values}, weight=self.shape)

    def fitted(self, shape: tuple[int, ...]) -> FullChange | None:
        """Return the change for that parameter: linear layers and 1x1 convolutions stand for each other."""
        return FullChange(self.values.reshape(shape)) if interchangeable(shape, self.shape) else None

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> FullChange:
        """Return a random change of about the base's own size."""
        import torch

        return cls(torch.randn(shape, generator=generator))


def parts_of_module(deltas: Mapping[str, Tensor], *, weight: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the parts of one module from the dense changes of its parameters.

    A1111 reads ``diff_b`` only beside ``diff`` and the two parts of a norm only together, so zeros stand for
    the one that does not change.

    Args:
        deltas: By the parameter's own name, "weight" or "bias".
        weight: Shape of the module's weight; one axis means a norm.

    Raises:
        ValueError: If a parameter has another name: files have no place for it.
    """
    names = _NORM if len(weight) == 1 else _LAYER
    if strays := deltas.keys() - names.keys():
        raise ValueError(f"only weights and biases have names in files, '{min(strays)}' has none")
    filled = dict(deltas)
    if "weight" not in filled:
        filled["weight"] = filled["bias"].new_zeros(weight)
    if names is _NORM and "bias" not in filled:
        filled["bias"] = filled["weight"].new_zeros(weight)
    return {names[parameter]: tensor for parameter, tensor in filled.items()}
