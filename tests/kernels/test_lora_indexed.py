"""Each sample's own low-rank changes, against the formula in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from studio.kernels.lora_indexed import (
    IndexedStack,
    lora_indexed,
    lora_indexed_conv,
    rows_of,
    stack_indexed,
    why_not_triton,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
# Sums of a few hundred products, each rounded in fp32.
FP32_ERROR = 3e-5
# Branches of rank 5 in two changes, of rank 0, and of rank 2.
RANKS = ((3, 2), (), (2,))
SCALES = [[0.7, -0.4], [], [1.3]]
LAYOUTS = {"sorted": [0, 0, 1, 1, 2, 2], "any-order": [2, -1, 0, 1, 2, 0], "unequal": [0, 0, 0, 1, 2, 2]}


class Operations(TorchDispatchMode):
    """Counts operations, views left out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _branches(inner: tuple[int, ...], out: int, dtype: torch.dtype = torch.float32) -> list[list]:
    ones = (1,) * (len(inner) - 1)
    return [
        [
            (
                (_random(rank, *inner, seed=10 * i + rank) * 0.2).to(dtype),
                (_random(out, rank, *ones, seed=50 + 10 * i + rank) * 0.2).to(dtype),
            )
            for rank in ranks
        ]
        for i, ranks in enumerate(RANKS)
    ]


def _stack(branches: list[list], dtype: torch.dtype = torch.float32) -> IndexedStack:
    return stack_indexed(branches, SCALES, device=CPU, dtype=dtype)


def _delta(branches: list[list], row: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the change of the layer's weight for a row, in fp64."""
    total = torch.zeros(shape, dtype=torch.float64)
    if row >= 0:
        for (down, up), scale in zip(branches[row], SCALES[row], strict=True):
            total += scale * (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
    return total


def _formula(x: torch.Tensor, y: torch.Tensor, branches: list[list], rows: list[int]) -> torch.Tensor:
    shape = (y.shape[-1], x.shape[-1])
    parts = [y[b].double() + x[b].double() @ _delta(branches, row, shape).t() for b, row in enumerate(rows)]
    return torch.stack(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [((), 63, 341), ((63,), 341, 1), ((3, 5), 1, 63)],
    ids=["vectors", "63-tokens", "image"],
)
def test_each_sample_has_the_changes_of_its_branch_added(
    tokens: tuple[int, ...], inputs: int, outputs: int, layout: str, dtype: str
) -> None:
    rows, kind = LAYOUTS[layout], DTYPES[dtype]
    x, y = _random(6, *tokens, inputs, seed=1).to(kind), _random(6, *tokens, outputs, seed=2).to(kind)
    branches = _branches((inputs,), outputs, kind)
    exact = _formula(x, y, branches, rows)
    one_by_one = y.clone()
    for b, row in enumerate(rows):
        for (down, up), scale in zip(branches[row], SCALES[row], strict=True) if row >= 0 else ():
            one_by_one[b] += x[b] @ down.t() @ up.t() * scale
    before = y.clone()
    got = lora_indexed(x, y, _stack(branches, kind), rows_of(rows, 3, device=CPU), backend="torch")
    assert got is y
    errors = [float((value.double() - exact).abs().max()) for value in (got, one_by_one)]
    # The 16-bit rule; in fp32 neither order of sums is the better one.
    assert errors[0] <= (FP32_ERROR if dtype == "fp32" else 2 * errors[1])
    bare = [b for b, row in enumerate(rows) if row in (-1, 1)]
    assert torch.equal(y[bare], before[bare])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel", "options"),
    [((3, 3), {"padding": (1, 1)}), ((1, 1), {"stride": (2, 2)}), ((3, 3), {"padding": "same", "groups": 3})],
    ids=["3x3", "stride", "groups"],
)
def test_each_sample_of_a_convolution_has_the_changes_of_its_branch_added(
    kernel: tuple[int, int], options: dict[str, Any], layout: str, channels_last: bool
) -> None:
    rows, groups = LAYOUTS[layout], options.get("groups", 1)
    x, weight = _random(6, 6, 7, 5, seed=1), _random(9, 6 // groups, *kernel, seed=2)
    branches = _branches((6 // groups, *kernel), 9)
    y = F.conv2d(x, weight, **options)
    wanted = torch.cat(
        [
            F.conv2d(
                x[b : b + 1].double(), weight.double() + _delta(branches, row, tuple(weight.shape)), **options
            )
            for b, row in enumerate(rows)
        ]
    )
    if channels_last:
        x, y = (tensor.to(memory_format=torch.channels_last) for tensor in (x, y))
    got = lora_indexed_conv(x, y, _stack(branches), rows_of(rows, 3, device=CPU), **options)
    assert got is y and (got.double() - wanted).abs().max() <= FP32_ERROR


def test_sorted_samples_take_two_operations_and_others_two_more() -> None:
    stack = _stack(_branches((8,), 6))
    x, y = torch.ones(6, 4, 8), torch.ones(6, 4, 6)
    for layout, wanted in (("sorted", 2), ("any-order", 4)):
        rows = rows_of(LAYOUTS[layout], 3, device=CPU)
        with Operations() as operations:
            lora_indexed(x, y, stack, rows)
        assert operations.count == wanted


def test_strided_activations_and_empty_batches() -> None:
    branches = _branches((63,), 8)
    x, y = _random(5, 63, 6, seed=1).permute(2, 0, 1), _random(6, 8, 5, seed=2).transpose(1, 2)
    assert not x.is_contiguous() and not y.is_contiguous()
    for layout in ("sorted", "any-order"):
        exact = _formula(x, y, branches, LAYOUTS[layout])
        lora_indexed(x, y, _stack(branches), rows_of(LAYOUTS[layout], 3, device=CPU), backend="torch")
        assert (y.double() - exact).abs().max() <= FP32_ERROR
    nobody = rows_of([], 3, device=CPU)
    assert lora_indexed(torch.ones(0, 4, 63), torch.ones(0, 4, 8), _stack(branches), nobody).shape == (
        0,
        4,
        8,
    )
    one = rows_of(LAYOUTS["sorted"], 3, device=CPU)
    assert lora_indexed(torch.ones(6, 0, 63), torch.ones(6, 0, 8), _stack(branches), one).shape == (6, 0, 8)
    image = _stack(_branches((6, 3, 3), 9))
    assert len(lora_indexed_conv(torch.ones(0, 6, 5, 5), torch.ones(0, 9, 3, 3), image, nobody)) == 0


def test_an_index_that_is_written_anew_in_place_is_followed() -> None:
    branches, rows = _branches((9,), 7), rows_of([2, 0], 3, device=CPU)
    x, y = _random(2, 4, 9, seed=1), _random(2, 4, 7, seed=2)
    rows.index.copy_(torch.tensor([0, -1]))
    exact = _formula(x, y, branches, [0, -1])
    assert (lora_indexed(x, y, _stack(branches), rows).double() - exact).abs().max() <= FP32_ERROR


def test_what_does_not_fit_is_refused() -> None:
    stack, rows = _stack(_branches((8,), 6)), rows_of([0, 1], 3, device=CPU)
    with pytest.raises(ValueError, match=r"rows must name branches 0 to 2, or -1 for none, got \[3\]"):
        rows_of([3], 3, device=CPU)
    with pytest.raises(ValueError, match=r"x \(3, 8\), y \(3, 6\) and down \(4, 5, 8\) do not fit"):
        lora_indexed(torch.ones(3, 8), torch.ones(3, 6), stack, rows)
    with pytest.raises(ValueError, match="one dtype"):
        lora_indexed(torch.ones(2, 8).half(), torch.ones(2, 6).half(), stack, rows)
    with pytest.raises(ValueError, match="one scale per pair"):
        stack_indexed(_branches((8,), 6), [[1.0], [], [1.0]], device=CPU, dtype=torch.float32)


def test_the_kernel_says_why_it_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, y = torch.ones(2, 3, 8), torch.ones(2, 3, 6)
    stack, rows = _stack(_branches((8,), 6)), rows_of([0, 1], 3, device=CPU)
    with pytest.raises(
        ValueError, match=r"'triton' does not apply: the activations lie on cpu.*Use backend='auto'"
    ):
        lora_indexed(x, y, stack, rows, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_triton(x, y) == "the package triton is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not_triton(x.double(), y.double()) is not None
    assert "cannot be written to" in str(why_not_triton(x, torch.ones(2, 6, 4, 3).mT))
    assert why_not_triton(x, y) is None
