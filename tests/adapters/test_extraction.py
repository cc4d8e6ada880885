"""The low-rank approximation of an adapter is the best one, and says what it loses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.extraction import extract_low_rank
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import AdapterError, UsageError

Factory = Callable[[], Any]
Everywhere = Callable[..., Adapter]
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_residuals_are_those_of_the_singular_values_left_out(
    short_sd: Factory, everywhere: Everywhere, rank: int
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe, kind="sparse", components=("unet.mid_block",))
    extraction = extract_low_rank(adapter, pipe, rank=rank)
    missed = whole = 0.0
    for name, change in adapter.changes.items():
        delta = change.delta(torch.zeros(change.shape), weight=1.0).double()
        whole += float(delta.norm() ** 2)
        if delta.ndim < 2:
            missed += float(delta.norm() ** 2)
            continue
        values = torch.linalg.svdvals(delta.flatten(1))
        left = float((values[rank:] ** 2).sum())
        missed += left
        # The factors are rounded to fp32.
        assert extraction.residuals[name] == pytest.approx((left**0.5) / float(values.norm()), abs=1e-6)
        got = extraction.adapter.changes[name]
        error = float((got.delta(torch.zeros(got.shape), weight=1.0).double() - delta).norm())
        assert error == pytest.approx(left**0.5, abs=1e-5)  # And once more as a product.
    assert extraction.total == pytest.approx((missed / whole) ** 0.5, abs=1e-6)


def test_what_has_no_low_rank_form_is_listed(short_sd: Factory, everywhere: Everywhere) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe, kind="full", components=("unet.mid_block",))
    extraction = extract_low_rank(adapter, pipe, rank=2)
    vectors = {name for name, change in adapter.changes.items() if len(change.shape) == 1}
    assert set(extraction.lost) == vectors and vectors
    assert extraction.adapter.changes.keys() == adapter.changes.keys() - vectors
    assert extraction.adapter.kind == "lora"
    assert f"relative residual {extraction.total:.4f}" in extraction.adapter.metadata["studio.extracted"]
    first, second = extraction.lines()
    worst = max(extraction.residuals, key=lambda name: extraction.residuals[name])
    assert f"{extraction.total:.3f}: median " in first and first.endswith(worst)
    assert second.startswith(f"without a low-rank form, left out: {len(vectors)} parameters: ")


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_what_has_low_rank_is_found_whole(short_sd: Factory, everywhere: Everywhere, kind: str) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe, kind=kind, components=("unet.mid_block",))
    extraction = extract_low_rank(adapter, pipe, rank=9)
    assert (
        max(extraction.residuals.values()) < 1e-6 and not extraction.lost
    )  # fp32 factors; LoHa: rank 3 x 3.
    for name, change in adapter.changes.items():
        base = find_parameter(components_of(pipe), name)
        got = extraction.adapter.changes[name].delta(base, weight=0.7)
        assert (got - change.delta(base, weight=0.7)).abs().max() < 1e-5, name  # fp32 products in two orders.


def test_rank_is_bounded_by_the_weights_smaller_side(short_sd: Factory, everywhere: Everywhere) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe, kind="full", components=("unet.mid_block",))
    change = extract_low_rank(adapter, pipe, rank=1000).adapter.changes[LINEAR]
    pair = change.low_rank()
    assert pair is not None and pair[0].shape == (32, 128)


def test_nothing_to_approximate_and_no_rank_are_said(short_sd: Factory, everywhere: Everywhere) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe, kind="full", components=("unet.mid_block.resnets.0.norm1",))
    with pytest.raises(AdapterError, match="changes no weight of a linear layer or convolution"):
        extract_low_rank(adapter, pipe, rank=1)
    with pytest.raises(UsageError, match="rank must be at least 1, got 0"):
        extract_low_rank(adapter, pipe, rank=0)
