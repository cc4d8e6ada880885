"""Small random adapters, and a merge of them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.merge import Merged, merge_adapters
from studio.registry import MERGERS

LINEAR = "unet.mid_block.attentions.0.proj_in.weight"
KERNEL = "unet.up_blocks.0.resnets.0.conv1.weight"
SHAPES = {LINEAR: (24, 40), KERNEL: (12, 8, 3, 3)}


def _lora(seed: int, *, rank: int = 3, alpha: float = 2.0, shapes: Mapping[str, Any] = SHAPES) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    changes = {
        name: LoraChange(draw(rank, *shape[1:]), draw(shape[0], rank, *(1 for _ in shape[2:])), alpha + index)
        for index, (name, shape) in enumerate(shapes.items())
    }
    return Adapter(f"lora{seed}", "lora", changes)


@pytest.fixture
def lora() -> Callable[..., Adapter]:
    """Return a function: seed, rank, alpha, shapes -> a random adapter."""
    return _lora


@pytest.fixture
def merged() -> Callable[..., Merged]:
    """Return a function: algorithm, adapters by name, weights by name, options -> what merging makes."""

    def run(
        how: str, adapters: Mapping[str, Adapter], weights: Mapping[str, float], **options: Any
    ) -> Merged:
        parameter = options.pop("parameter", None)
        spectra = options.pop("spectra", False)
        merger = MERGERS[how](**options)
        return merge_adapters(adapters, weights, merger, parameter=parameter, spectra=spectra)

    return run


@pytest.fixture
def full() -> Callable[..., torch.Tensor]:
    """Return a function from an adapter (or a merge) and a parameter to its change in full, fp64."""

    def form(of: Adapter | Merged, name: str = LINEAR, weight: float = 1.0) -> torch.Tensor:
        change = (of.adapter if isinstance(of, Merged) else of).changes[name]
        if not isinstance(change, LoraChange):
            return change.delta(torch.empty(change.shape), weight=weight).double()
        scale = weight * change.alpha / change.rank
        product = change.up.double().flatten(1) @ change.down.double().flatten(1)
        return scale * product.reshape(change.shape)

    return form
