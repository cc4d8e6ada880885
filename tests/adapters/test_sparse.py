"""Sparse changes and the studio's own files of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.errors import AdapterError

Factory = Callable[[], Any]
Everywhere = Callable[..., Adapter]
# Gaps around the longest that one code holds, 65535, and around twice that.
EDGES = [0, 1, 65536, 131071, 196606, 262142, 393212, 524283, 2**30, 2**31 - 2]


def _change(indices: list[int], size: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> SparseChange:
    values = torch.linspace(-1, 1, len(indices), dtype=dtype) + 0.25
    return SparseChange(torch.tensor(indices, dtype=torch.int32), values, size)


@pytest.mark.parametrize(
    "indices", [EDGES, EDGES[1:], [0], [65534], [65535], [2**31 - 2], list(range(100_000))], ids=len
)
def test_gaps_hold_every_index(indices: list[int]) -> None:
    change = _change(indices, (2**31 - 1,))
    parts = change.to_parts(alpha=1.0, parameter="bias")
    assert parts["bias.gaps"].dtype == torch.int16
    again = SparseChange.from_parts(parts)["bias"]
    assert torch.equal(again.indices, change.indices) and torch.equal(again.values, change.values)


def test_gaps_cost_two_bytes_an_entry_and_one_code_for_each_long_stretch_without() -> None:
    dense = _change(list(range(0, 70_000, 7)), (70_000,)).to_parts(alpha=1.0)
    assert dense["weight.gaps"].nbytes == 2 * 10_000
    far = _change([0, 65_535 * 3], (200_000,)).to_parts(alpha=1.0)
    assert far["weight.gaps"].tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize("weight", [-1.0, 0.3, 1.0, 2.0, 17.5])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (6, 5, 3, 3)], ids=["vector", "linear", "conv"])
def test_values_land_at_their_row_major_places(shape: tuple[int, ...], weight: float) -> None:
    change = SparseChange.sample(shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(shape, dtype=torch.float64)
    for index, value in zip(change.indices.tolist(), change.values.tolist(), strict=True):
        place = []
        for side in reversed(shape):
            index, inside = divmod(index, side)
            place.append(inside)
        wanted[tuple(reversed(place))] = weight * value
    delta = change.delta(torch.zeros(shape), weight=weight)
    # fp32 rounds the weight and the product.
    assert bool(((delta - wanted).abs() <= wanted.abs() * 2**-23).all()) and bool(delta.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "16", "b16"])
def test_bank_adds_entries_as_it_would_add_the_dense_change_and_leaves_the_others(
    short_sd: Factory, everywhere: Everywhere, dtype: torch.dtype
) -> None:
    pipe, dense_pipe = short_sd().to(dtype), short_sd().to(dtype)
    one, two = everywhere(pipe, kind="sparse", seed=1), everywhere(pipe, kind="sparse", seed=2)
    components, theirs = components_of(pipe), components_of(dense_pipe)
    before = {name: find_parameter(components, name).detach().clone() for name in one.changes}
    pairs = {name: [(one.changes[name], 1.7), (two.changes[name], -0.3)] for name in one.changes}
    full = {
        name: [(FullChange(change.delta(before[name], weight=scale)), 1.0) for change, scale in found]
        for name, found in pairs.items()
    }
    WeightBank(components, pairs).apply(pairs)
    WeightBank(theirs, full).apply(full)
    for name, found in pairs.items():
        got = find_parameter(components, name)
        assert torch.equal(got, find_parameter(theirs, name)), name
        untouched = torch.ones(got.numel(), dtype=torch.bool)
        for change, _ in found:
            assert isinstance(change, SparseChange)
            untouched[change.indices.long()] = False
        assert torch.equal(got.flatten()[untouched], before[name].flatten()[untouched]), name


@pytest.mark.parametrize(
    ("indices", "values", "size", "words"),
    [
        (torch.tensor([0, 2]), torch.ones(2), (4,), "torch.int64 and torch.float32, int32 and a floating"),
        (torch.tensor([0]).int(), torch.ones(1).int(), (4,), "torch.int32 and torch.int32"),
        (torch.tensor([0, 2]).int(), torch.ones(3), (4,), r"indices \[2\] and values \[3\]"),
        (torch.tensor([[0]]).int(), torch.ones(1, 1), (4,), r"indices \[1, 1\] and values \[1, 1\]"),
        (torch.tensor([2, 0]).int(), torch.ones(2), (4,), "not in ascending order, or name an entry twice"),
        (torch.tensor([2, 2]).int(), torch.ones(2), (4,), "not in ascending order, or name an entry twice"),
        (torch.tensor([0, 4]).int(), torch.ones(2), (2, 2), r"reach from 0 to 4, .* \[2, 2\] .* 0 to 3"),
        (torch.tensor([-1, 2]).int(), torch.ones(2), (4,), "reach from -1 to 2"),
        (torch.tensor([0]).int(), torch.tensor([float("nan")]), (4,), "NaN or infinity"),
        (torch.tensor([0]).int(), torch.ones(1), (), r"\[\] is the shape of no parameter"),
        (torch.tensor([0]).int(), torch.ones(1), (4, 0), r"\[4, 0\] is the shape of no parameter"),
        (torch.tensor([0]).int(), torch.ones(1), (2**16, 2**15), "more than 2147483647 entries"),
    ],
    ids=[
        "int64",
        "int-values",
        "length",
        "axes",
        "order",
        "twice",
        "beyond",
        "before",
        "nan",
        "scalar",
        "empty",
        "large",
    ],
)
def test_what_makes_no_sparse_change_is_refused(
    indices: torch.Tensor, values: torch.Tensor, size: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SparseChange(indices, values, size)


GOOD = {
    "weight.gaps": torch.tensor([1, 2], dtype=torch.int16),
    "weight.delta": torch.ones(2),
    "weight.shape": torch.tensor([2, 2]),
}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"weight.gaps": None}, "it lacks weight.gaps"),
        ({"weight.delta": None, "weight.shape": None}, "it lacks weight.delta, weight.shape"),
        ({"bias.delta": torch.ones(1)}, "it lacks bias.gaps, bias.shape"),
        ({"weight.gaps": torch.tensor([1, 2])}, r"weight.gaps is torch.int64 \[2\], int16 \[n\]"),
        ({"weight.gaps": GOOD["weight.gaps"][None]}, r"weight.gaps is torch.int16 \[1, 2\]"),
        ({"weight.shape": torch.ones(2)}, r"weight.shape is torch.float32 \[2\], int64 \[n\]"),
        ({"weight.shape": torch.tensor(4)}, r"weight.shape is torch.int64 \[\]"),
        ({"weight.shape": torch.tensor([1, 2])}, "in its weight, the indices reach from 0 to 2"),
        ({"weight.shape": torch.tensor([-2, -2])}, "is the shape of no parameter"),
        ({"weight.delta": torch.ones(3)}, r"in its weight, indices \[2\] and values \[3\]"),
        ({"weight.gaps": torch.zeros(40_000, dtype=torch.int16)}, "the gaps lead to entry 2621399999"),
    ],
)
def test_parts_that_make_no_sparse_change_are_refused(
    parts: dict[str, torch.Tensor | None], words: str
) -> None:
    merged = {name: part for name, part in (GOOD | parts).items() if part is not None}
    with pytest.raises(ValueError, match=words):
        SparseChange.from_parts(merged)


@pytest.mark.parametrize("asked", [(5, 6), (6, 5, 3, 3), (30,), (6,), (), (6, 5, 1)])
def test_sparse_change_fits_no_other_shape(asked: tuple[int, ...]) -> None:
    assert _change([0, 29], (6, 5)).fitted(asked) is None


def test_sparse_change_of_a_linear_layer_fits_its_pointwise_convolution() -> None:
    fitted = _change([0, 29], (6, 5)).fitted((6, 5, 1, 1))
    assert fitted is not None and fitted.delta(torch.zeros(6, 5, 1, 1), weight=1.0)[5, 4, 0, 0] == 1.25


def _adapter(pipe: Any, everywhere: Everywhere, **metadata: str) -> Adapter:
    return replace(everywhere(pipe, kind="sparse"), metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "16", "b16"])
def test_own_file_brings_back_every_index_and_value(
    tmp_path: Path, tiny_sdxl: Factory, everywhere: Everywhere, dtype: torch.dtype
) -> None:
    pipe = tiny_sdxl()
    adapter = everywhere(pipe, kind="sparse")
    again = load_adapter(
        save_adapter(adapter, tmp_path / "a.safetensors", format="sara", dtype=dtype), base=pipe
    )
    assert (
        again.kind == "sparse"
        and list(again.changes) != []
        and again.changes.keys() == adapter.changes.keys()
    )
    for name, change in adapter.changes.items():
        back = again.changes[name]
        assert isinstance(change, SparseChange) and isinstance(back, SparseChange)
        assert torch.equal(back.indices, change.indices) and back.shape == change.shape
        assert torch.equal(back.values, change.values.to(dtype))


def test_own_file_is_in_fp32_and_says_nothing_of_what_does_not_change(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere
) -> None:
    adapter = everywhere(short_sd(), kind="sparse")
    first, *others = adapter.changes
    nothing = SparseChange(torch.empty(0, dtype=torch.int32), torch.empty(0), adapter.changes[first].shape)
    partly = replace(adapter, changes={**adapter.changes, first: nothing})
    header = read_header(save_adapter(partly, tmp_path / "a.safetensors", format="sara"))
    assert {dtype for key, (dtype, _) in header.tensors.items() if key.endswith(".delta")} == {"F32"}
    assert {key.rpartition(".")[0] for key in header.tensors} == set(others)
    with pytest.raises(AdapterError, match="'sara': no entry changes"):
        save_adapter(replace(adapter, changes={first: nothing}), tmp_path / "b.safetensors", format="sara")


def test_file_that_misses_a_part_or_names_a_parameter_the_base_lacks_is_refused(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere
) -> None:
    pipe = short_sd()
    path = save_adapter(everywhere(pipe, kind="sparse"), tmp_path / "a.safetensors", format="sara")
    tensors = safetensors.torch.load_file(path)
    name = "unet.mid_block.resnets.0.norm1.bias"
    for changed, words in (
        ({f"{name}.delta": None}, r"is damaged at 'unet.mid_block.resnets.0.norm1': it lacks bias.delta"),
        (
            {f"{name}.shape": torch.tensor([33])},
            r"the shapes of unet.mid_block.resnets.0.norm1 \(33, the base",
        ),
        ({f"{name}.shape": torch.tensor([2])}, "in its bias, the indices reach from"),
        ({f"{name}.extra": torch.ones(1)}, f"holds unexpected tensors: {name}.extra"),
        ({"unet.no.such.weight.gaps": torch.ones(1).short()}, "it has no layer for unet.no.such.weight.gaps"),
    ):
        wrong = {key: tensor for key, tensor in {**tensors, **changed}.items() if tensor is not None}
        safetensors.torch.save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(AdapterError, match=words):
            load_adapter(tmp_path / "wrong.safetensors", base=pipe)


def test_reloaded_change_gives_the_trained_weights_bit_for_bit(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere
) -> None:
    pipe = short_sd()
    components, adapter = components_of(pipe), everywhere(pipe, kind="sparse")
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="sara")
    again = load_adapter(path, base=pipe)
    with WeightBank(components, adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        wanted = {name: find_parameter(components, name).detach().clone() for name in adapter.changes}
        bank.apply({name: [(change, 1.0)] for name, change in again.changes.items()})
        assert all(torch.equal(find_parameter(components, name), wanted[name]) for name in wanted)


def test_metadata_keeps_how_the_entries_were_selected(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere
) -> None:
    rule = json.dumps({"threshold": 0.002})
    adapter = _adapter(short_sd(), everywhere, **{"studio.sara": rule})
    metadata = read_header(save_adapter(adapter, tmp_path / "a.safetensors", format="sara")).metadata
    assert metadata["studio.sara"] == rule and metadata["studio.format_version"] == "1"


def test_names_without_a_base_are_those_of_the_full_size_models(tmp_path: Path) -> None:
    name = "unet.up_blocks.0.attentions.0.transformer_blocks.9.ff.net.2.bias"
    adapter = Adapter("a", "sparse", {name: _change([0, 1279], (1280,))})
    path = save_adapter(adapter, tmp_path / "a.safetensors", format="sara")
    assert list(load_adapter(path).changes) == [name]


def test_every_parameter_of_a_pipeline_has_a_place_in_the_file(tmp_path: Path, tiny_sdxl: Factory) -> None:
    pipe = tiny_sdxl()
    names = canonical_names(components_of(pipe))
    changes = {name: _change([0], shape) for name, shape in names.items()}
    path = save_adapter(Adapter("a", "sparse", changes), tmp_path / "a.safetensors", format="sara")
    assert load_adapter(path, base=pipe).changes.keys() == names.keys()
