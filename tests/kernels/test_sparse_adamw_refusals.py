"""What the sparse AdamW step, gathering and scattering refuse, and why a plan keeps Triton away."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.kernels.sparse_adamw import SparsePlan, gather, scatter_, sparse_adamw_


def _arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "weights": [torch.zeros(4)],
        "indices": [torch.tensor([0, 2], dtype=torch.int32)],
        **{name: torch.zeros(2) for name in ("values", "grads", "exp_avg", "exp_avg_sq")},
        "step": 1,
        "lr": 0.1,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": []}, "one vector of indices per weight is wanted, got 0 for 1"),
        ({"indices": [torch.tensor([0, 2])]}, "indices 0 must be an int32 vector, got torch.int64"),
        (
            {"indices": [torch.zeros(1, 2, dtype=torch.int32)]},
            r"int32 vector, got torch.int32 of shape \(1, 2\)",
        ),
        (
            {"indices": [torch.tensor([2, 0], dtype=torch.int32)]},
            "indices 0 must be strictly ascending. Sort",
        ),
        (
            {"indices": [torch.tensor([2, 2], dtype=torch.int32)]},
            "indices 0 must be strictly ascending. Sort",
        ),
        ({"indices": [torch.tensor([0, 4], dtype=torch.int32)]}, "indices 0 must lie in 0 to 3, got 0 to 4"),
        (
            {"indices": [torch.tensor([-1, 0], dtype=torch.int32)]},
            "indices 0 must lie in 0 to 3, got -1 to 0",
        ),
        ({"weights": [torch.zeros(4, dtype=torch.int64)]}, "a tensor of a floating dtype, got torch.int64"),
        ({"weights": [torch.zeros(1).expand(4)]}, "entries of weight 0 share memory.*Clone it first"),
        ({"weights": [torch.zeros(6).as_strided((2, 2), (2, 2))]}, "entries of weight 0 share memory"),
        (
            {"weights": [torch.zeros(4, device="meta")]},
            "indices 0 lie on cpu, their tensor on meta. Move one",
        ),
        ({"values": torch.zeros(3)}, "values must be a contiguous fp32 vector of 2 on cpu, got"),
        ({"grads": torch.zeros(2, dtype=torch.float16)}, "grads must be a contiguous fp32 vector"),
        ({"exp_avg": torch.zeros(4)[::2]}, "exp_avg must be a contiguous fp32 vector"),
        ({"exp_avg_sq": torch.zeros(2, device="meta")}, "exp_avg_sq must be a contiguous fp32 vector"),
        ({"step": 0}, "step counts from 1, got 0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"lr": math.nan}, "lr must be finite and at least 0, got nan"),
        ({"eps": -1.0}, "eps must be finite and at least 0, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and at least 0, got inf"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str
) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(ValueError, match=message):
        sparse_adamw_(**arguments)
    assert all(not bool(weight.any()) for weight in arguments["weights"] if weight.is_cpu)


def test_weights_of_two_devices_are_refused() -> None:
    weights = [torch.zeros(2), torch.zeros(2, device="meta")]
    indices = [torch.zeros(0, dtype=torch.int32, device=weight.device) for weight in weights]
    with pytest.raises(ValueError, match="weights must lie on one device, got cpu and meta"):
        SparsePlan(weights, indices)


def test_a_weight_that_changed_its_shape_needs_a_new_plan() -> None:
    arguments = _arguments()
    weight = arguments["weights"][0]
    plan = SparsePlan(arguments.pop("weights"), arguments.pop("indices"))
    weight.data = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"weight 0 is \(2, 2\) and was \(4,\).*Make a new plan"):
        plan.adamw_(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, i: gather(w, i + 3), "indices must lie in 0 to 3, got 3 to 5"),
        (lambda w, i: gather(w, i - 1), "indices must lie in 0 to 3, got -1 to 1"),
        (lambda w, i: gather(w.long(), i), "a tensor of a floating dtype, got torch.int64"),
        (
            lambda w, i: gather(w, i, accumulate=True),
            "accumulate=True adds to 'out', which is not given. Pass",
        ),
        (lambda w, i: gather(w, i, out=torch.zeros(3)), "out must be a contiguous fp32 vector of 2"),
        (lambda w, i: gather(w, i, out=torch.zeros(2).half()), "out must be a contiguous fp32 vector of 2"),
        (lambda w, i: scatter_(w, i, torch.zeros(3)), r"values must be \(2,\) of a floating dtype on cpu"),
        (lambda w, i: scatter_(w, i, torch.zeros(2).long()), r"values must be \(2,\) of a floating dtype"),
        (lambda w, i: scatter_(w[:1].expand(4), i, torch.zeros(2)), "entries of dense share memory"),
        (lambda w, i: scatter_(w, i + 3, torch.zeros(2)), "indices must lie in 0 to 3, got 3 to 5"),
    ],
)
def test_gather_and_scatter_refuse_what_does_not_fit(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4), torch.tensor([0, 2], dtype=torch.int32))


@pytest.mark.parametrize("numel", [2**31, 2**31 + 1])
def test_int32_positions_reach_two_to_the_31_entries(numel: int) -> None:
    dense = torch.empty(numel, device="meta")
    positions = torch.zeros(0, dtype=torch.int32, device="meta")
    if numel > 2**31:
        with pytest.raises(ValueError, match=r"reach 2\*\*31 entries.*2147483649. Split it into views"):
            gather(dense, positions)
    else:
        assert gather(dense, positions).shape == (0,)


def test_the_plan_says_why_triton_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = _arguments()
    plan = SparsePlan(arguments.pop("weights"), arguments.pop("indices"))
    assert plan.why_not_triton() == "the weights lie on cpu, the kernel runs on CUDA"
    with pytest.raises(
        ValueError, match=r"'triton' does not apply: the weights lie on cpu.*Use backend='auto'"
    ):
        plan.adamw_(**arguments, backend="triton")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (
            torch.zeros(720, dtype=torch.float64),
            "weight 0 is torch.float64, the kernel writes fp32, fp16 and",
        ),
        (torch.zeros(6, 5, 4, 3, 2).permute(4, 3, 2, 1, 0), "weight 0 has 5 axes apart in memory, at most 4"),
        (torch.zeros(720), "indices 0 are not contiguous"),
    ],
    ids=["dtype", "axes", "indices"],
)
def test_the_plan_says_which_tensor_keeps_triton_away(
    weight: torch.Tensor, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    plan = SparsePlan([weight], [torch.arange(720, dtype=torch.int32)[::2]])
    assert str(plan.why_not_triton()).startswith(reason)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan.why_not_triton() == "the package triton is not installed"
    # The step is made all the same.
    plan.adamw_(*(torch.ones(360) for _ in range(4)), step=1, lr=0.1)
    assert int(weight.count_nonzero()) == 360
