"""The sum of a weight and its changes against the formula in fp64."""

import pytest
import torch

from studio.kernels.merge_bank import Sparse, merge_bank

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# weight, down, up
SHAPES = {
    "linear-63x341-rank5": ((63, 341), (5, 341), (63, 5)),
    "linear-1x1-rank1": ((1, 1), (1, 1), (1, 1)),
    "conv3x3": ((6, 5, 3, 3), (4, 5, 3, 3), (6, 4, 1, 1)),
    "conv1x1": ((6, 5, 1, 1), (4, 5, 1, 1), (6, 4, 1, 1)),
    "conv1x1-linear-pair": ((6, 5, 1, 1), (4, 5), (6, 4)),
    "linear-conv1x1-pair": ((6, 5), (4, 5, 1, 1), (6, 4, 1, 1)),
}


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _formula(weight: torch.Tensor, deltas: list, scales: list[float]) -> torch.Tensor:
    total = weight.double()
    for delta, scale in zip(deltas, scales, strict=True):
        if isinstance(delta, tuple):
            down, up = (factor.double().flatten(1) for factor in delta)
            delta = (up @ down).reshape(weight.shape)
        total = total + scale * delta.double().reshape(weight.shape)
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_is_the_formula_rounded_once(shape: str, dtype: torch.dtype) -> None:
    size, down, up = SHAPES[shape]
    weight = _random(*size, seed=0).to(dtype)
    pair = (_random(*down, seed=1).to(dtype), _random(*up, seed=2).to(dtype))
    deltas, scales = [pair, _random(*size, seed=3), pair], [0.7, -0.3, 1.1]
    wanted = _formula(weight, deltas, scales)
    got = merge_bank(weight, deltas, scales)
    assert got.dtype == dtype and got.shape == weight.shape
    # Half a unit in the last place for the one rounding, and fp32's own error for the sum.
    bound = wanted.abs() * torch.finfo(dtype).eps * 0.5 + 2e-5
    assert bool(((got.double() - wanted).abs() <= bound).all())


def _sparse(*shape: int, seed: int) -> tuple[Sparse, torch.Tensor]:
    """Return a change of every fifth entry or so, and the same dense."""
    dense = _random(*shape, seed=seed) * (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    )
    indices = dense.flatten().nonzero().squeeze(1)
    return Sparse(indices.int(), dense.flatten()[indices]), dense


@pytest.mark.parametrize("scales", [(0.0, 1.0), (2.0, 0.7), (-3.3, 1e-3)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("size", [(63,), (63, 341), (6, 5, 3, 3), (1, 1)], ids=str)
def test_sparse_changes_give_the_bits_of_the_dense_sum(
    size: tuple[int, ...], dtype: torch.dtype, scales: tuple[float, float]
) -> None:
    weight = _random(*size, seed=0).to(dtype)
    (one, dense_one), (two, dense_two) = _sparse(*size, seed=1), _sparse(*size, seed=2)
    got = merge_bank(weight, [one, two], scales)
    wide = torch.promote_types(dtype, torch.float32)
    dense = [dense_one.to(wide) * scales[0], dense_two.to(wide) * scales[1]]
    assert torch.equal(got, merge_bank(weight, dense, [1.0, 1.0]))


def test_sparse_changes_mix_with_dense_and_low_rank_ones_in_any_layout() -> None:
    weight = _random(12, 10, seed=0).t()[:, ::2]
    (change, dense), full = _sparse(10, 6, seed=1), _random(10, 6, seed=2)
    pair = (_random(3, 6, seed=3), _random(10, 3, seed=4))
    wanted = _formula(weight, [dense, full, pair], [0.5, 2.0, -1.0])
    got = merge_bank(weight, [change, full, pair], [0.5, 2.0, -1.0])
    assert (got.double() - wanted).abs().max() <= 2e-5  # fp32 sums.


def test_entries_that_no_sparse_change_names_keep_every_bit() -> None:
    bits = torch.tensor([0x7FA00001, -(2**31), 1, 0x3F800000], dtype=torch.int32)
    change = Sparse(torch.tensor([3]), torch.tensor([2.0]))
    got = merge_bank(bits.view(torch.float32).reshape(2, 2), [change], [0.5]).flatten()
    assert torch.equal(got[:3].view(torch.int32), bits[:3]) and got[3] == 2


def test_many_16_bit_changes_are_rounded_once_and_not_one_by_one() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    small = torch.full((4, 4), 2.0**-10)  # An eighth of bf16's unit at 1: each alone would be rounded away.
    assert torch.equal(merge_bank(weight, [small] * 16, [1.0] * 16), torch.full_like(weight, 1 + 2.0**-6))


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    weight = _random(10, 6, seed=0).t()[:, ::2]
    down, up = _random(10, 4, seed=1)[::2].t(), _random(4, 6, seed=2).t()
    assert not (weight.is_contiguous() or down.is_contiguous() or up.is_contiguous())
    got = merge_bank(weight, [(down, up), weight], [0.5, 2.0])
    wanted = merge_bank(
        weight.contiguous(), [(down.contiguous(), up.contiguous()), weight.contiguous()], [0.5, 2.0]
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 3, 3, 3)], ids=["no-rows", "no-columns", "conv"])
def test_empty_weights_stay_empty(size: tuple[int, ...]) -> None:
    pair = (torch.zeros(2, *size[1:]), torch.zeros(size[0], 2, *(1 for _ in size[2:])))
    assert merge_bank(torch.zeros(size), [pair, torch.zeros(size)], [1.0, 1.0]).shape == size


def test_rank_zero_and_no_deltas_change_nothing() -> None:
    weight = _random(3, 4, seed=0)
    assert torch.equal(merge_bank(weight, [(torch.zeros(0, 4), torch.zeros(3, 0))], [1.0]), weight)
    assert torch.equal(merge_bank(weight, [], []), weight)


def test_scale_zero_leaves_every_bit_even_of_nan_and_negative_zero() -> None:
    bits = torch.tensor([[0x7FA00001, -(2**31)], [1, 0x7F800000]], dtype=torch.int32)
    weight = bits.view(torch.float32)
    got = merge_bank(weight, [torch.full((2, 2), float("inf"))], [0.0])
    assert torch.equal(got.view(torch.int32), bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_result_may_go_into_an_uninitialised_tensor(dtype: torch.dtype) -> None:
    weight, delta = _random(5, 7, seed=0).to(dtype), _random(5, 7, seed=1)
    before = weight.clone()
    out = torch.full((7, 5), float("nan"), dtype=dtype).t()
    assert merge_bank(weight, [delta], [0.5], out=out) is not weight
    assert torch.equal(out, merge_bank(weight, [delta], [0.5]))
    assert torch.equal(weight, before)


def test_parameters_that_require_gradients_give_plain_results() -> None:
    weight = torch.nn.Parameter(_random(3, 3, seed=0))
    got = merge_bank(weight, [torch.nn.Parameter(torch.ones(3, 3))], [1.0])
    assert not got.requires_grad and torch.equal(got, weight.detach() + 1)


def _overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    store = torch.zeros(20)
    return store[:12].view(3, 4), store[8:].view(3, 4)


SQUARE = torch.zeros(2, 2)
PART, OTHER_PART = _overlapping()


@pytest.mark.parametrize(
    ("weight", "deltas", "scales", "out", "words"),
    [
        (SQUARE, [SQUARE], [], None, "one scale per delta is wanted, got 0 for 1"),
        (SQUARE, [torch.zeros(2, 3)], [1.0], None, r"shape \(2, 3\) does not fit weight \(2, 2\)"),
        (
            SQUARE,
            [(torch.zeros(3, 2), torch.zeros(2, 1))],
            [1.0],
            None,
            r"\(3, 2\) and \(2, 1\) does not fit",
        ),
        (torch.zeros(4), [(torch.zeros(1, 1), torch.zeros(4, 1))], [1.0], None, "does not fit"),
        (
            SQUARE,
            [Sparse(torch.tensor([0, 4]), torch.ones(2))],
            [1.0],
            None,
            r"\(2,\) and \(2,\) does not fit",
        ),
        (SQUARE, [Sparse(torch.tensor([-1]), torch.ones(1))], [1.0], None, "does not fit"),
        (SQUARE, [Sparse(torch.tensor([0, 1]), torch.ones(1))], [1.0], None, r"\(2,\) and \(1,\) does not"),
        (SQUARE, [SQUARE], [float("nan")], None, "scale 0 must be finite"),
        (SQUARE.to(torch.int8), [], [], None, "floating dtype, got torch.int8"),
        (
            SQUARE,
            [],
            [],
            SQUARE.half(),
            r"out must be \(2, 2\) torch.float32 on cpu, got \(2, 2\) torch.float16",
        ),
        (SQUARE, [], [], torch.zeros(4, 1), r"out must be .*, got \(4, 1\)"),
        (PART, [], [], OTHER_PART, "shares memory with an input"),
        (torch.ones(3, 4), [PART], [1.0], OTHER_PART, "shares memory with an input"),
    ],
    ids=[
        "count",
        "dense",
        "ranks",
        "vector",
        "sparse-beyond",
        "sparse-before",
        "sparse-length",
        "nan",
        "integer",
        "out-dtype",
        "out-shape",
        "out-weight",
        "out-delta",
    ],
)
def test_what_does_not_fit_is_refused(
    weight: torch.Tensor, deltas: list, scales: list[float], out: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        merge_bank(weight, deltas, scales, out=out)
