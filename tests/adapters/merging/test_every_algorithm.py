"""What holds for every merging algorithm of the registry, and for every kind of adapter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.oft import OftChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.merge import Merged
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import AdapterError, SpecError, UsageError
from studio.registry import KINDS, MERGERS
from studio.specs import MergeOptions, MergeSpec, parse_spec

Make = Callable[..., Adapter]
Run = Callable[..., Merged]
Full = Callable[..., Tensor]
LINEAR = "unet.mid_block.attentions.0.proj_in.weight"
KERNEL = "unet.up_blocks.0.resnets.0.conv1.weight"
WEIGHTS = {"a": 0.8, "b": 1.3}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 products in another order.


@pytest.fixture
def two(lora: Make) -> dict[str, Adapter]:
    return {"a": lora(1, rank=2), "b": lora(2, rank=4)}


def whole(how: str) -> dict[str, Any]:
    """Return options with which all that the algorithm makes is written."""
    return {"dense": True} if "dense" in MERGERS[how].reads() else {}


@pytest.mark.parametrize("how", list(MERGERS))
def test_all_weights_times_a_number_is_the_change_times_the_number(
    merged: Run, two: dict[str, Adapter], full: Full, how: str
) -> None:
    once = merged(how, two, WEIGHTS, **whole(how))
    thrice = merged(how, two, {name: 3 * weight for name, weight in WEIGHTS.items()}, **whole(how))
    times = 1 if how == "soup" else 3
    for name in (LINEAR, KERNEL):
        torch.testing.assert_close(full(thrice, name), times * full(once, name), **CLOSE)


@pytest.mark.parametrize("how", list(MERGERS))
def test_the_order_of_adapters_does_not_matter(
    merged: Run, two: dict[str, Adapter], full: Full, how: str
) -> None:
    one = merged(how, two, WEIGHTS)
    other = merged(how, dict(reversed(two.items())), dict(reversed(WEIGHTS.items())))
    for name in (LINEAR, KERNEL):
        torch.testing.assert_close(full(one, name), full(other, name), **CLOSE)


@pytest.mark.parametrize("how", list(MERGERS))
def test_the_same_request_gives_the_same_bits(merged: Run, two: dict[str, Adapter], how: str) -> None:
    one, other = (merged(how, two, WEIGHTS).adapter.changes for _ in range(2))
    for name, change in one.items():
        assert isinstance(change, LoraChange) and isinstance(other[name], LoraChange)
        assert torch.equal(change.up, other[name].up) and torch.equal(change.down, other[name].down)


def test_a_seed_changes_what_is_drawn(merged: Run, two: dict[str, Adapter], full: Full) -> None:
    seeded = [how for how in MERGERS if "merge_seed" in MERGERS[how].reads()]
    assert seeded == ["dare", "lego"]
    draws = [full(merged("dare", two, WEIGHTS, merge_seed=seed, dense=True)) for seed in (0, 1)]
    assert not torch.equal(*draws)
    starts = [full(merged("lego", two, WEIGHTS, merge_seed=seed, rank=3)) for seed in range(8)]
    assert any(not torch.equal(starts[0], start) for start in starts)


@pytest.mark.parametrize("how", list(MERGERS))
def test_one_adapter_alone_comes_back_at_its_weight(merged: Run, lora: Make, full: Full, how: str) -> None:
    adapter = lora(1)
    options = whole(how) | ({"density": 1.0} if "density" in MERGERS[how].reads() else {})
    got = merged(how, {"a": adapter}, {"a": -0.7}, **options)
    for name in (LINEAR, KERNEL):
        wanted = full(adapter, name, 1.0 if how == "soup" else -0.7)
        torch.testing.assert_close(full(got, name), wanted, **CLOSE)


@pytest.mark.parametrize("how", list(MERGERS))
def test_a_layer_of_one_adapter_only_is_merged_as_if_it_were_alone(
    merged: Run, lora: Make, full: Full, how: str
) -> None:
    one = lora(1, shapes={LINEAR: (24, 40)})
    other = lora(2, shapes={KERNEL: (12, 8, 3, 3)})
    got = merged(how, {"a": one, "b": other}, WEIGHTS, **whole(how))
    assert set(got.layers) == {LINEAR, KERNEL}
    alone = merged(how, {"a": one}, {"a": WEIGHTS["a"]}, **whole(how))
    # The mean of two models of which one leaves the layer alone.
    share = WEIGHTS["a"] / sum(WEIGHTS.values()) if how == "soup" else 1.0
    torch.testing.assert_close(full(got), share * full(alone), **CLOSE)


@pytest.mark.parametrize("how", list(MERGERS))
def test_a_weight_of_zero_leaves_an_adapter_out(
    merged: Run, two: dict[str, Adapter], full: Full, how: str
) -> None:
    got = merged(how, two, {"a": 0.8, "b": 0.0})
    alone = merged(how, {"a": two["a"]}, {"a": 0.8})
    assert torch.equal(full(got), full(alone)) and got.layers[LINEAR].ranks == (2,)


@pytest.mark.parametrize("how", [name for name in MERGERS if "rank" in MERGERS[name].reads()])
def test_the_rank_is_what_is_asked_for_or_the_largest_of_the_adapters(
    merged: Run, two: dict[str, Adapter], how: str
) -> None:
    assert {layer.rank for layer in merged(how, two, WEIGHTS).layers.values()} == {4}
    assert {layer.rank for layer in merged(how, two, WEIGHTS, rank=3).layers.values()} == {3}
    most = merged(how, two, WEIGHTS, rank=1000).layers
    # The smaller side, and of a sum of products the sum of their ranks.
    bounds = {LINEAR: 6, KERNEL: 6} if how in ("lego", "svd") else {LINEAR: 24, KERNEL: 12}
    assert {name: layer.rank for name, layer in most.items()} == bounds


@pytest.mark.parametrize("how", [name for name in MERGERS if "dense" in MERGERS[name].reads()])
def test_dense_writes_all_and_the_error_of_a_rank_is_that_to_it(
    merged: Run, two: dict[str, Adapter], full: Full, how: str
) -> None:
    dense, thin = merged(how, two, WEIGHTS, dense=True), merged(how, two, WEIGHTS)
    for name in (LINEAR, KERNEL):
        assert isinstance(dense.adapter.changes[name], FullChange) and dense.layers[name].error == 0
        apart = float((full(thin, name) - full(dense, name)).norm())
        assert thin.layers[name].error == pytest.approx(apart, rel=1e-4) and apart > 0
        nearest = torch.linalg.svdvals(full(dense, name).flatten(1))[4:].norm()
        assert apart == pytest.approx(float(nearest), rel=1e-4)  # No other product of rank 4 is nearer.


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[[], Any]) -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def reader(base: Any) -> Callable[[str], Tensor]:
    components = components_of(base)
    return lambda name: find_parameter(components, name).detach()


@pytest.mark.parametrize("kind", list(KINDS))
def test_linear_takes_every_kind_at_its_weight(
    merged: Run, base: Any, reader: Any, everywhere: Make, kind: str
) -> None:
    part = ("unet.mid_block", "text_encoder.text_model.encoder.layers.0")
    adapters = {
        "one": everywhere(base, kind=kind, components=part),
        "plain": everywhere(base, seed=1, components=part),
    }
    weights = {"one": 0.6, "plain": -0.5}
    got = merged("linear", adapters, weights, parameter=reader)
    assert got.adapter.changes.keys() == adapters["one"].changes.keys() | adapters["plain"].changes.keys()
    for name, change in got.adapter.changes.items():
        weight = reader(name)
        wanted = sum(
            adapter.changes[name].delta(weight, weight=weights[key])
            for key, adapter in adapters.items()
            if name in adapter.changes
        )
        torch.testing.assert_close(change.delta(weight, weight=1.0), wanted, **CLOSE)


@pytest.mark.parametrize("how", list(MERGERS))
@pytest.mark.parametrize("kind", ["full", "dora", "oft"])
def test_every_algorithm_takes_changes_of_full_rank_biases_and_norms(
    merged: Run, base: Any, reader: Any, everywhere: Make, how: str, kind: str
) -> None:
    part = ("unet.mid_block.resnets.0", "unet.mid_block.attentions.0.norm")
    adapters = {str(seed): everywhere(base, kind=kind, seed=seed, components=part) for seed in (1, 2)}
    ranked = {"rank": 3} if "rank" in MERGERS[how].reads() else {}
    got = merged(how, adapters, {"1": 1.0, "2": 0.5}, parameter=reader, **ranked)
    assert got.adapter.changes.keys() == adapters["1"].changes.keys()
    for name, layer in got.layers.items():
        thin = len(layer.change.shape) > 1 and bool(ranked)
        assert isinstance(layer.change, LoraChange if thin else FullChange), name
        assert layer.change.shape == adapters["1"].changes[name].shape


def test_sparse_changes_stay_sparse_in_their_sum(merged: Run, full: Full) -> None:
    def sparse(entries: dict[int, float]) -> Adapter:
        places = torch.tensor(list(entries), dtype=torch.int32)
        return Adapter(
            "s", "sparse", {LINEAR: SparseChange(places, torch.tensor([*entries.values()]), (3, 4))}
        )

    adapters = {"a": sparse({0: 1.0, 5: 2.0}), "b": sparse({5: 4.0, 7: 3.0})}
    change = merged("linear", adapters, {"a": 1.0, "b": 0.5}).adapter.changes[LINEAR]
    assert isinstance(change, SparseChange)
    assert change.indices.tolist() == [0, 5, 7] and change.values.tolist() == [1.0, 4.0, 1.5]


def test_a_linear_layer_and_a_pointwise_convolution_are_one_layer(
    merged: Run, lora: Make, full: Full
) -> None:
    flat, kernel = lora(1, shapes={LINEAR: (8, 6)}), lora(2, shapes={LINEAR: (8, 6, 1, 1)})
    got = merged("svd", {"a": flat, "b": kernel}, {"a": 1.0, "b": 1.0}, rank=6)
    assert got.adapter.changes[LINEAR].shape == (8, 6, 1, 1)
    wanted = full(flat).reshape(8, 6, 1, 1) + full(kernel)
    torch.testing.assert_close(full(got), wanted, **CLOSE)


def test_what_cannot_be_merged_is_said(merged: Run, lora: Make) -> None:
    small, large = lora(1), lora(2, shapes={LINEAR: (24, 41)})
    with pytest.raises(
        AdapterError, match=r"'b' changes '.*' in the shape \[24, 41\], \[24, 40\] was expected"
    ):
        merged("linear", {"a": small, "b": large}, {"a": 1.0, "b": 1.0})
    generator = torch.Generator().manual_seed(0)
    turned = Adapter("turned", "oft", {LINEAR: OftChange.sample((24, 40), generator=generator)})
    with pytest.raises(AdapterError, match="depends on the base's weight, and the base is not loaded"):
        merged("linear", {"a": turned}, {"a": 1.0})
    dense = Adapter("dense", "full", {LINEAR: FullChange(torch.ones(24, 40))})
    with pytest.raises(UsageError, match=r"a rank to merge at\. Give rank or dense"):
        merged("ties", {"a": dense}, {"a": 1.0})
    with pytest.raises(UsageError, match=r"none of the adapters has a rank to merge at\. Give rank\."):
        merged("svd", {"a": dense}, {"a": 1.0})
    with pytest.raises(AdapterError, match="nothing is left of a, b: no change, or all cancel"):
        merged("linear", {"a": dense, "b": dense}, {"a": 1.0, "b": -1.0})
    with pytest.raises(UsageError, match="the sum of the weights, which is 0"):
        merged("soup", {"a": small, "b": small}, {"a": 1.0, "b": -1.0})


@pytest.mark.parametrize("how", list(MERGERS))
def test_every_option_has_a_field_of_the_specification(how: str) -> None:
    assert MERGERS[how].reads() <= set(MergeOptions.model_fields)
    assert MergeOptions(how=how).merger() == MERGERS[how]()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"how": "tiss"}, "how: unknown merging algorithm 'tiss'. Did you mean 'ties'?"),
        (
            {"how": "svd", "density": 0.5},
            "density: counts only where how is one of dare, magnitude, pcb, ties",
        ),
        ({"how": "linear", "rank": 3}, "rank: counts only where how is one of .*svd.*; got 'linear'"),
        ({"how": "ties", "rank": 3, "dense": True}, "dense: a dense adapter has no rank"),
        ({"how": "ties", "density": 0}, "density: Input should be greater than 0"),
        ({"how": "lego", "combine": "ties"}, "combine: counts only where how is one of dare; got 'lego'"),
        ({"output": "x.pt"}, "output: must be a file name that ends in .safetensors"),
        ({"preview": "x.jpg"}, "preview: must be a file name that ends in .png"),
        ({"format": "kohja"}, "format: unknown adapter format 'kohja'. Did you mean 'kohya'?"),
        ({"adapters": ()}, "adapters: Tuple should have at least 1 item"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_specification_says_what_is_wrong_with_it(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem.replace("?", "\\?")):
        parse_spec(MergeSpec, {"adapters": ["a.safetensors"]} | given)
