"""Adapters with random changes, for any pipeline and kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.parameters import canonical_names, components_of
from studio.registry import KINDS

# Kohya's own loader builds nothing outside the blocks; text projections and embeddings are no targets.
_NO_TARGETS = (
    "unet.time_embedding",
    "unet.add_embedding",
    "unet.conv_in",
    "unet.conv_out",
    "embeddings",
    "text_projection",
)


def _everywhere(pipe: Any, *, kind: str = "lora", seed: int = 0, components: tuple[str, ...] = ()) -> Adapter:
    names = canonical_names(components_of(pipe))
    targets = {
        name: shape
        for name, shape in names.items()
        if name.endswith(".weight") and len(shape) > 1 and not any(part in name for part in _NO_TARGETS)
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
    """Return a function that makes an adapter for every linear layer and convolution of a pipeline."""
    return _everywhere
