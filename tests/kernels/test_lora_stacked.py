"""All low-rank changes of a layer in two operations, against the formula in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from studio.kernels.lora_stacked import Stacked, fold, lora_stacked, lora_stacked_conv, stack

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
# Sums of a few hundred products, each rounded in fp32.
FP32_ERROR = 3e-5
SCALES = [0.7, -0.4, 1.3]


class Operations(TorchDispatchMode):
    """Counts operations, views left out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pairs(
    inner: tuple[int, ...], out: int, ranks: tuple[int, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ones = (1,) * (len(inner) - 1)
    return [
        (_random(rank, *inner, seed=rank) * 0.2, _random(out, rank, *ones, seed=99 + rank) * 0.2)
        for rank in ranks
    ]


def _delta(pairs: list, scales: list[float]) -> torch.Tensor:
    """Return the change of the layer's weight in fp64."""
    total = sum(
        scale * (up.double().flatten(1) @ down.double().flatten(1))
        for (down, up), scale in zip(pairs, scales, strict=True)
    )
    return total.reshape(-1, *pairs[0][0].shape[1:])  # type: ignore[union-attr]


def _linear(x: torch.Tensor, y: torch.Tensor, pairs: list, scales: list[float]) -> torch.Tensor:
    return y.double() + x.double() @ _delta(pairs, scales).t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "inputs", "outputs", "ranks"),
    [((1,), 1, 1, (1,)), ((2, 63), 341, 63, (4,)), ((3, 5, 7), 63, 341, (1, 5, 16)), ((0, 4), 8, 8, (2,))],
    ids=["1x1", "63x341", "three-changes", "empty-batch"],
)
def test_what_a_linear_layer_gives_has_the_changes_added(
    lead: tuple[int, ...], inputs: int, outputs: int, ranks: tuple[int, ...], dtype: str
) -> None:
    kind, scales = DTYPES[dtype], SCALES[: len(ranks)]
    x, y = _random(*lead, inputs, seed=1).to(kind), _random(*lead, outputs, seed=2).to(kind)
    pairs = [(down.to(kind), up.to(kind)) for down, up in _pairs((inputs,), outputs, ranks)]
    exact = _linear(x, y, pairs, scales)
    one_by_one = y.clone()
    for (down, up), scale in zip(pairs, scales, strict=True):
        one_by_one = one_by_one + (x @ down.t() @ up.t()) * scale
    got = lora_stacked(x, y, stack(pairs, scales, device=CPU, dtype=kind))
    assert got is y
    errors = [
        float((value.double() - exact).abs().amax()) if y.numel() else 0.0 for value in (got, one_by_one)
    ]
    # The 16-bit rule; in fp32 neither order of sums is the better one.
    assert errors[0] <= (FP32_ERROR if dtype == "fp32" else 2 * errors[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": (1, 1)}),
        ((3, 3), {"stride": (2, 2), "padding": (1, 1)}),
        ((1, 1), {}),
        ((3, 2), {"dilation": (2, 1), "padding": (0, 1)}),
        ((3, 3), {"padding": "same"}),
        ((3, 3), {"padding": (1, 1), "groups": 3}),
    ],
    ids=["3x3", "stride", "pointwise", "dilation", "same", "groups"],
)
def test_what_a_convolution_gives_has_the_changes_added(
    kernel: tuple[int, int], options: dict[str, Any], layout: str
) -> None:
    groups = options.get("groups", 1)
    x, weight = _random(2, 6, 9, 7, seed=1), _random(12, 6 // groups, *kernel, seed=2)
    pairs = _pairs((6 // groups, *kernel), 12, (3, 4))
    y = F.conv2d(x, weight, **options)
    exact = F.conv2d(x.double(), weight.double() + _delta(pairs, SCALES[:2]), **options)
    if layout == "channels-last":
        x, y = (tensor.to(memory_format=torch.channels_last) for tensor in (x, y))
    elif layout == "strided":
        x, y = (torch.stack([tensor, tensor], -1)[..., 0] for tensor in (x, y))
    got = lora_stacked_conv(x, y, stack(pairs, SCALES[:2], device=CPU, dtype=x.dtype), **options)
    assert got is y
    assert (got.double() - exact).abs().max() <= FP32_ERROR


@pytest.mark.parametrize("count", [1, 3, 8])
def test_any_number_of_changes_takes_two_operations(count: int) -> None:
    ranks = tuple(range(1, count + 1))
    linear = stack(_pairs((8,), 6, ranks), [1.0] * count, device=CPU, dtype=torch.float32)
    conv = stack(_pairs((8, 3, 3), 6, ranks), [1.0] * count, device=CPU, dtype=torch.float32)
    x, y = torch.ones(2, 5, 8), torch.ones(2, 5, 6)
    with Operations() as operations:
        lora_stacked(x, y, linear)
    assert operations.count == 2
    image, answer = torch.ones(2, 8, 4, 4), torch.ones(2, 6, 4, 4)
    for last in (False, True):
        if last:
            image, answer = (part.to(memory_format=torch.channels_last) for part in (image, answer))
        with Operations() as operations:
            lora_stacked_conv(image, answer, conv, padding=(1, 1))
        assert operations.count == 2


def test_strided_activations_give_what_contiguous_ones_give() -> None:
    x, y = _random(5, 63, 4, seed=1).permute(2, 0, 1), _random(5, 7, 8, seed=2)[:, ::2].transpose(0, 1)
    pairs = _pairs((63,), 8, (3, 2))
    assert not x.is_contiguous() and not y.is_contiguous()
    exact = _linear(x, y, pairs, SCALES[:2])
    got = lora_stacked(x, y, stack(pairs, SCALES[:2], device=CPU, dtype=torch.float32))
    assert (got.double() - exact).abs().max() <= FP32_ERROR


def test_other_scales_are_folded_from_the_plain_factors_and_do_not_drift() -> None:
    pairs = _pairs((9,), 5, (2, 3))
    stacked = stack(pairs, [1.0, 1.0], device=CPU, dtype=torch.bfloat16)
    address = stacked.up.data_ptr()
    for scale in (0.1, 7.3, -2.0, 1e-3):
        fold(stacked.folded, stacked.plain, [scale, 0.3 - scale])
    fresh = stack(pairs, [1e-3, 0.3 - 1e-3], device=CPU, dtype=torch.bfloat16)
    assert torch.equal(stacked.up, fresh.up) and stacked.up.data_ptr() == address


def test_one_fold_serves_many_layers() -> None:
    stacks = [stack(_pairs((9,), 5, (2, 3)), [1.0, 1.0], device=CPU, dtype=torch.float32) for _ in range(4)]
    folded = [part for one in stacks for part in one.folded]
    with Operations() as operations:
        fold(folded, [part for one in stacks for part in one.plain], [0.5] * 8)
    assert operations.count == 2
    assert all(torch.equal(one.up, torch.cat(one.plain) * 0.5) for one in stacks)


def _stacked() -> Stacked:
    return stack(_pairs((8,), 6, (2,)), [1.0], device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(2, 7), torch.ones(2, 6), r"x \(2, 7\), y \(2, 6\) and down \(2, 8\) do not fit"),
        (torch.ones(2, 8), torch.ones(3, 6), "do not fit"),
        (torch.ones(2, 8).half(), torch.ones(2, 6), "one dtype, got torch.float16, torch.float32"),
    ],
    ids=["inputs", "rows", "dtype"],
)
def test_activations_that_do_not_fit_are_refused(x: torch.Tensor, y: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lora_stacked(x, y, _stacked())


def test_factors_that_do_not_fit_are_refused() -> None:
    (pair,), (other,) = _pairs((8,), 6, (2,)), _pairs((7,), 6, (2,))
    for pairs, scales, words in (
        ([pair], [], "one scale per pair"),
        ([], [], "factors of one layer are wanted, got none"),
        ([pair, other], [1.0, 1.0], "factors of one layer are wanted"),
        ([(pair[0], other[1].t())], [1.0], "no factors of one change"),
    ):
        with pytest.raises(ValueError, match=words):
            stack(pairs, scales, device=CPU, dtype=torch.float32)
