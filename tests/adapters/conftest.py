"""Adapters with random changes, for any pipeline and kind."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.parameters import canonical_names, components_of
from studio.registry import FORMATS, KINDS

# Kohya's own loader builds nothing outside the blocks; text projections and embeddings are no targets.
_NO_TARGETS = (
    "unet.time_embedding",
    "unet.add_embedding",
    "unet.conv_in",
    "unet.conv_out",
    "embeddings",
    "text_projection",
)
# Kinds that change parameters of any number of axes, so biases and norms too.
_ANY_PARAMETER = ("full", "sparse")
# What kinds each format holds; a format that is not named holds all.
_HOLDS = {"diffusers": ("lora", "dora"), "sara": ("sparse",), "embedding": ()}
# Kinds that a format writes as another one.
_WRITTEN_AS = {("sparse", "kohya"): "full"}


def _everywhere(pipe: Any, *, kind: str = "lora", seed: int = 0, components: tuple[str, ...] = ()) -> Adapter:
    names = canonical_names(components_of(pipe))
    targets = {
        name: shape
        for name, shape in names.items()
        if kind in _ANY_PARAMETER or (name.endswith(".weight") and len(shape) > 1)
        if not any(part in name for part in _NO_TARGETS)
    }
    generator = torch.Generator().manual_seed(seed)
    changes = {
        name: KINDS[kind].sample(shape, generator=generator)
        for name, shape in targets.items()
        if not components or name.startswith(components)
    }
    return Adapter(name="style", kind=kind, changes=changes)


@pytest.fixture(scope="session")
def everywhere() -> Callable[..., Adapter]:
    """Return a function that makes an adapter for every linear layer and convolution of a pipeline.

    Kinds that can change the biases and norms as well.
    """
    return _everywhere


@pytest.fixture(scope="session")
def kept_as() -> Mapping[tuple[str, str], str | None]:
    """Return by kind and format the kind that comes back from the file, None where the format refuses."""
    return {
        (kind, form): _WRITTEN_AS.get((kind, form), kind) if kind in _HOLDS.get(form, KINDS) else None
        for kind in KINDS
        for form in FORMATS
    }
