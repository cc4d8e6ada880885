"""The Triton kernels against the torch reference and the formula: interpreted on the CPU, or on CUDA."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from studio.kernels.lora_indexed import IndexedStack, lora_indexed, rows_of, stack_indexed

pytest.importorskip("triton", reason="the package triton is not installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Branches of rank 20 in two changes, of rank 0, and of rank 3.
RANKS = ((17, 3), (), (3,))
SCALES = [[0.7, -0.4], [], [1.3]]
ROWS = [2, -1, 0, 1, 0]
# tokens, inputs, outputs
SIZES = {"1-token": (1, 63, 341), "63-tokens": (63, 341, 63), "1x1": (17, 1, 1)}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Give the device; on the CPU the kernels are interpreted, settled when their module is imported."""
    name = "studio.kernels.lora_indexed_triton"
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop(name, None)
        yield torch.device("cpu")
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill torch.empty with NaN, so that what is read without having been written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _stack(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> IndexedStack:
    branches = [
        [
            (_random(rank, inputs, seed=rank) * 0.2, _random(outputs, rank, seed=50 + rank) * 0.2)
            for rank in ranks
        ]
        for ranks in RANKS
    ]
    return stack_indexed(branches, SCALES, device=device, dtype=dtype)


def _formula(x: torch.Tensor, y: torch.Tensor, stack: IndexedStack, rows: list[int]) -> torch.Tensor:
    down, up = (part[rows].double().cpu() for part in (stack.down, stack.up))
    return y.double().cpu() + x.double().cpu() @ down.mT @ up


def _check(x: torch.Tensor, y: torch.Tensor, stack: IndexedStack, rows: list[int]) -> None:
    index = rows_of(rows, len(RANKS), device=x.device)
    exact = _formula(x, y, stack, rows)
    by_torch = lora_indexed(x, y.clone(), stack, index, backend="torch")
    before, shape = y.clone(), y.stride()
    got = lora_indexed(x, y, stack, index, backend="triton")
    assert got is y and y.stride() == shape
    bare = [b for b, row in enumerate(rows) if row in (-1, 1)]
    assert torch.equal(y[bare], before[bare])
    errors = [float((value.double().cpu() - exact).abs().max()) for value in (got, by_torch)]
    # The interpreter cuts bf16 off where hardware rounds: a whole unit in the last place, not half of one.
    cut = float(exact.abs().max()) * 2**-7 if x.is_cpu and x.dtype == torch.bfloat16 else 0.0
    # The 16-bit rule; for fp32, sums of a few hundred products in another order.
    assert errors[0] <= 2 * errors[1] + cut + (3e-5 if x.dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_add_what_the_reference_adds(size: str, dtype: str, device: torch.device) -> None:
    tokens, inputs, outputs = SIZES[size]
    kind = DTYPES[dtype]
    x, y = (_random(5, tokens, width, seed=width).to(device, kind) for width in (inputs, outputs))
    _check(x, y, _stack(inputs, outputs, kind, device), ROWS)


def test_strided_activations_vectors_and_empty_batches(device: torch.device) -> None:
    stack = _stack(40, 24, torch.float32, device)
    x = _random(40, 5, 7, seed=1).to(device).permute(1, 2, 0)
    y = _random(5, 24, 14, seed=2).to(device).mT[:, ::2]
    _check(x, y, stack, ROWS)
    _check(x[:, 0], y[:, 0], stack, ROWS)
    nobody = rows_of([], len(RANKS), device=device)
    assert lora_indexed(x[:0], y[:0], stack, nobody, backend="triton").shape == (0, 7, 24)


def test_inputs_split_among_programs_are_summed_in_one_order(device: torch.device) -> None:
    stack = _stack(1100, 8, torch.float32, device)
    x, y = (_random(5, 2, width, seed=width).to(device) for width in (1100, 8))
    again = y.clone()
    _check(x, y, stack, ROWS)
    lora_indexed(x, again, stack, rows_of(ROWS, len(RANKS), device=device), backend="triton")
    assert torch.equal(y, again)


def test_auto_takes_the_kernels_where_samples_are_in_any_order(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.kernels import lora_indexed_triton

    def launch(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(lora_indexed_triton, "launch", launch)
    stack = _stack(8, 6, torch.float32, device)
    x, y = torch.ones(6, 4, 8, device=device), torch.ones(6, 4, 6, device=device)
    lora_indexed(x, y, stack, rows_of([0, 0, 1, 1, 2, 2], 3, device=device))
    with pytest.raises(AssertionError, match="launched"):
        lora_indexed(x, y, stack, rows_of([0, 0, 1, 2, 1, 2], 3, device=device))


def test_the_kernels_compile_for_nvidia(tmp_path: Path) -> None:
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from studio.kernels.lora_indexed_triton import _expand, _shrink, tiles

def program(kernel, dtype, capability):
    sizes = tiles(4096, 64, wide=dtype == "fp32") | {"UPCAST": False}
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    pointers = dict.fromkeys(("x", "down", "up", "y"), dtype) | {"z": "fp32", "index": "i64", "ranks": "i32"}
    types = {name: "*" + pointers[name] if name in pointers else "i32" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

for kernel, dtype, capability in ((_shrink, "bf16", 90), (_expand, "bf16", 80), (_expand, "fp32", 80)):
    print("CUT", program(kernel, dtype, capability))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    _, *programs = done.stdout.split("CUT")
    assert len(programs) == 3
    for number, program in enumerate(programs):
        # Half precision on tensor cores; fp32 without, as TF32 would round the factors.
        assert ("mma" in program) == (number < 2)
        assert "tf32" not in program
        assert ".local" not in program  # Nothing spills from registers.
