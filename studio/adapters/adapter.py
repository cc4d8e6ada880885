"""What an adapter is: changes to named parameters of a pipeline, and perhaps new tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@runtime_checkable
class Change(Protocol):
    """A change to one parameter."""

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return what to add to the parameter, fp32 and of its shape, on its device.

        The weight is inside because some kinds (DoRA, OFT) are not linear in it.
        """
        ...

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return ``(down [r, in...], up [out, r...])`` whose product is the full change, or None."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        ...


class KindOfChange(Change, Protocol):
    """What a class in the registry of adapter kinds offers: a change that files can hold.

    In files a change is a group of tensors under one module, each called by its *part*, the suffix of kohya's
    spelling ("lora_down.weight"). Formats spell parts and modules; kinds give them meaning.
    """

    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]]

    @property
    def alpha(self) -> float | None:
        """What files call alpha, or None for a kind without."""
        ...

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor]) -> Mapping[str, Self]:
        """Return the changes of one module by the parameter's own name ("weight", "bias").

        Raises:
            ValueError: If the parts do not fit each other; the text says what, got and wanted.
        """
        ...

    def to_parts(self, *, alpha: float) -> Mapping[str, Tensor]:
        """Return the parts to write, scaled for the ``alpha`` that the file will hold."""
        ...

    def fitted(self, shape: tuple[int, ...]) -> Self | None:
        """Return the same change for a parameter of that shape, or None if it does not fit one."""
        ...

    @classmethod
    def sample(cls, shape: tuple[int, ...], *, generator: torch.Generator) -> Self:
        """Return a random change of that shape: what the checks shared by all kinds are run with."""
        ...


class Format(Protocol):
    """What a member of the registry of adapter formats offers.

    Attributes:
        bound_to_base: Whether its files are for one base only, the one that their metadata names.
    """

    bound_to_base: bool

    def recognises(self, keys: Collection[str]) -> bool:
        """Say whether a file with those tensor keys is of this format."""
        ...

    def write(
        self, adapter: Adapter, *, family: str | None, names: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the tensors to write by key, and the alpha that they are written with.

        Args:
            adapter: What to write.
            family: "sd1", "sd2", "sdxl" or None: whose names to use.
            names: Names and shapes of the base's parameters; empty where the base is not known.

        Raises:
            ValueError: If the adapter cannot be written in this format.
        """
        ...


class ChangeFormat(Format, Protocol):
    """A format of changes, which is all of them but the one for tokens."""

    def split(self, key: str) -> tuple[str, str] | None:
        """Return the file's name of the module and the part in kohya's spelling; None for other keys."""
        ...

    def table(self, names: Collection[str]) -> Mapping[str, str]:
        """Return the canonical module by the file's name of it, for a model with those parameters."""
        ...

    def complete(
        self, modules: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Return a file's tensors by module and part in kohya's layout, with what only the metadata says.

        Raises:
            ValueError: If the metadata cannot be understood.
        """
        ...


@dataclass(frozen=True)
class Adapter:
    """A set of changes under one name.

    Attributes:
        name: For messages and weights; usually the file's stem.
        kind: Name in the registry of adapter kinds ("lora"), or "textual-inversion" where there are tokens
            only.
        changes: From parameter name to change. A parameter is named by the pipeline's component and the
            parameter's own name in canonical spelling: ``unet.mid_block.attentions.0.proj_in.weight``,
            ``text_encoder.text_model.encoder.layers.0.mlp.fc1.weight`` (always with ``text_model.``).
        tokens: New tokens with embeddings ``[vectors, width]`` by text encoder component.
        metadata: The file's own metadata, strings only.
    """

    name: str
    kind: str
    changes: Mapping[str, Change]
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def interchangeable(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Say whether a change of one shape is a change of the other.

    Shapes are the same, or those of a linear layer and a 1x1 convolution: some tools write one for the other.
    """
    pointwise = all(len(shape) in (2, 4) and set(shape[2:]) <= {1} for shape in (one, other))
    return one == other or (pointwise and one[:2] == other[:2])
