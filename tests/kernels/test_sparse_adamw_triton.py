"""The Triton kernel against the torch reference and the formula: interpreted on the CPU, compiled on CUDA."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.kernels.sparse_adamw import SparsePlan, gather

pytest.importorskip("triton", reason="the package triton is not installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUMBERS: dict[str, Any] = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Give the device; on the CPU the kernel is interpreted, which is settled when its module is imported."""
    name = "studio.kernels.sparse_adamw_triton"
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


def _random(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _chosen(numel: int) -> torch.Tensor:
    count = max(1, 2 * numel // 3)
    return torch.randperm(numel, generator=torch.Generator().manual_seed(numel))[:count].sort().values.int()


def _state(size: int) -> list[torch.Tensor]:
    values, grads, first = (_random(size, seed) for seed in range(3))
    return [values, grads, first * 0.1, _random(size, 3).square() * 0.01]


def _formula(state: list[torch.Tensor]) -> torch.Tensor:
    """Return the new values in fp64."""
    theta, g, m, v = (vector.double() for vector in state)
    (beta1, beta2), step, lr = NUMBERS["betas"], NUMBERS["step"], NUMBERS["lr"]
    m_hat = (beta1 * m + (1 - beta1) * g) / (1 - beta1**step)
    v_hat = (beta2 * v + (1 - beta2) * g * g) / (1 - beta2**step)
    return theta * (1 - lr * NUMBERS["weight_decay"]) - lr * m_hat / (v_hat.sqrt() + NUMBERS["eps"])


def _cast(values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what the kernel is to write: values rounded once. The interpreter cuts bf16 off instead."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return values.to(dtype)


def _layouts(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Weights of NaN, so that an entry that was not written shows."""

    def nan(*shape: int) -> torch.Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    return {
        "scalar": nan(),
        "63": nan(63),
        "341": nan(341),
        "three-blocks": nan(61, 51),
        "transposed": nan(11, 31).t(),
        "channels-last": nan(5, 8, 3, 3).to(memory_format=torch.channels_last),
        "sliced": nan(20, 40)[3::2, 1:38:3],
        "4-axes": nan(2, 2, 5, 3).permute(2, 0, 3, 1)[::2],
    }


def _step(
    weights: list[torch.Tensor], indices: list[torch.Tensor], state: list[torch.Tensor], by: str
) -> None:
    SparsePlan(weights, indices).adamw_(*state, **NUMBERS, backend=by)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", _layouts())
def test_the_kernel_makes_the_step_of_the_reference(layout: str, dtype: str, device: torch.device) -> None:
    weight, weight_by_torch = (_layouts(DTYPES[dtype], device)[layout] for _ in range(2))
    positions = _chosen(weight.numel())
    before = _state(positions.numel())
    state, by_torch = ([vector.to(device, copy=True) for vector in before] for _ in range(2))
    _step([weight], [positions.to(device)], state, "triton")
    _step([weight_by_torch], [positions.to(device)], by_torch, "torch")

    assert torch.equal(state[1].cpu(), before[1])
    for got, wanted in zip(state, by_torch, strict=True):
        # Two units in the last place: the compiler may fuse a product and a sum, torch may not.
        torch.testing.assert_close(got, wanted, rtol=2.4e-7, atol=1.2e-7)
    assert int(weight.isnan().sum()) == weight.numel() - positions.numel()
    written = gather(weight, positions.to(device)).cpu()
    assert torch.equal(written, _cast(state[0].cpu(), DTYPES[dtype], device).float())
    if device.type == "cpu" and dtype == "bf16":
        return
    exact = _formula(before)
    by_torch_written = gather(weight_by_torch, positions.to(device)).cpu()
    errors = [(entries.double() - exact).abs().max().item() for entries in (written, by_torch_written)]
    # The 16-bit rule; in fp32 an error of none may become one of a unit in the last place.
    assert errors[0] <= 2 * errors[1] + 2.4e-7 * exact.abs().max().item()


def test_weights_of_all_kinds_and_empty_segments_take_one_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.kernels import sparse_adamw_triton

    kernel, grids = sparse_adamw_triton._step, []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    weights, copies = (
        [weight for dtype in DTYPES.values() for weight in _layouts(dtype, device).values()] for _ in range(2)
    )
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    indices = [
        empty if number % 5 == 1 else _chosen(w.numel()).to(device) for number, w in enumerate(weights)
    ]
    before = _state(sum(vector.numel() for vector in indices))
    state, by_torch = ([vector.to(device, copy=True) for vector in before] for _ in range(2))
    monkeypatch.setattr(sparse_adamw_triton, "_step", Counted())
    _step(weights, indices, state, "triton")
    assert len(grids) == 1
    _step(copies, indices, by_torch, "torch")
    for got, wanted in zip(state, by_torch, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2.4e-7, atol=1.2e-7)  # As above.
    for got, wanted in zip(weights, copies, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        # A unit in the last place: the interpreter cuts bf16 off where hardware rounds.
        unit = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, wanted, rtol=unit, atol=1.2e-7, equal_nan=True)


def test_many_steps_keep_to_the_reference_and_leave_other_bits_alone(device: torch.device) -> None:
    memory = _random(800, 9).half()
    memory[::7] = math.nan
    old = memory.clone()
    moved = memory.to(device)
    weight = moved.view(20, 40)[3::2, 1:38:3]
    positions = _chosen(weight.numel())
    plan = SparsePlan([weight], [positions.to(device)])
    state = [_random(positions.numel(), 0), *(torch.zeros(positions.numel()) for _ in range(2))]
    values, first, second = (vector.to(device, copy=True) for vector in state)
    parameter = torch.nn.Parameter(state[0].clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, foreach=False)
    for step in range(1, 21):
        parameter.grad = _random(positions.numel(), step)
        optimizer.step()
        plan.adamw_(values, parameter.grad.to(device), first, second, step=step, lr=1e-2, backend="triton")
    # Twenty steps of two units in the last place each, at most.
    torch.testing.assert_close(values.cpu(), parameter.detach(), rtol=1e-5, atol=1e-5)
    chosen = torch.zeros(800, dtype=torch.bool)
    chosen[torch.arange(800).view(20, 40)[3::2, 1:38:3].flatten()[positions.long()]] = True
    assert torch.equal(moved.cpu().view(torch.int16)[~chosen], old.view(torch.int16)[~chosen])
    assert torch.equal(moved.cpu()[chosen].sort().values, values.cpu().half().sort().values)


def test_tables_follow_data_that_was_replaced(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.zeros(5, 8, 3, 3, device=device))
    positions = _chosen(360).to(device)
    plan = SparsePlan([weight], [positions])
    replaced: list[tuple[torch.Tensor, torch.Tensor]] = []
    for change in (
        torch.clone,
        lambda w: w.to(memory_format=torch.channels_last),
        torch.clone,
        torch.Tensor.half,
    ):
        weight.data = change(weight.data)
        state = [vector.to(device) * (1 + len(replaced)) for vector in _state(240)]
        plan.adamw_(*state, **NUMBERS, backend="triton")
        assert torch.equal(gather(weight, positions), state[0].to(weight.dtype).float())
        assert all(torch.equal(data, then) for data, then in replaced)
        replaced.append((weight.data, weight.detach().clone()))


def test_auto_takes_triton_where_it_applies(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.kernels import sparse_adamw_triton

    def launch(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(sparse_adamw_triton, "launch", launch)
    plan = SparsePlan([torch.zeros(3, device=device)], [torch.zeros(1, dtype=torch.int32, device=device)])
    assert plan.why_not_triton() is None
    with pytest.raises(AssertionError, match="launched"):
        plan.adamw_(*(torch.zeros(1, device=device) for _ in range(4)), **NUMBERS)


def test_the_kernel_compiles_for_nvidia_and_rounds_as_the_reference(tmp_path: Path) -> None:
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from studio.kernels.sparse_adamw_triton import BLOCK, _step

types = ["*i64"] * 2 + ["*fp32"] * 4 + ["fp32"] * 7 + ["constexpr"]
signature = dict(zip(_step.arg_names, types, strict=True))
source = ASTSource(_step, signature=signature, constexprs={"BLOCK": BLOCK})
for capability in (80, 90):
    print("CUT", triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])
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
    assert len(programs) == 2
    for program in programs:
        for rounded in ("div.rn.f32", "sqrt.rn.f32", "cvt.rn.bf16", "cvt.rn.f16.f32"):
            assert rounded in program
        assert ".local" not in program  # Nothing spills from registers.
