"""What a step of the sparse AdamW costs beside dense AdamW, over the tensors of a UNet.

python tests/benchmarks/bench_sparse_adamw.py --rounds 7 --json sparse_adamw.json

The UNet is Stable Diffusion 1.5's, a quarter as wide (``--width 320`` for its own width). Checks first that
the sparse step is AdamW on the chosen entries and moves no other. Rounds are interleaved. Each row gives
median, p20 and p80, the median of its ratios to "dense fused" round by round, and the most it allocates
while it works; "dense fused again" is the noise floor. On the CPU times are CPU seconds of one thread, on
CUDA they are those of events.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from bench_train_cost import machine
from torch import Tensor

from studio.kernels.sparse_adamw import SparsePlan, gather, scatter_, sparse_adamw_

NUMBERS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def unet_shapes(width: int) -> list[torch.Size]:
    """Return the shapes of a UNet like that of Stable Diffusion 1.5, whose width is 320."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768 * width // 320,
            attention_head_dim=8,
            norm_num_groups=16,
        )
    return [parameter.shape for parameter in unet.parameters()]


class Case:
    """Weights with gradients, a share of whose entries is chosen, and every way to make a step."""

    def __init__(
        self, shapes: list[torch.Size], share: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * 0.02

        self.weights = [random(*shape).to(dtype) for shape in shapes]
        self.grads = [random(*shape).to(dtype) for shape in shapes]
        self.indices = [
            (torch.rand(w.numel(), generator=generator, device=device) < share).nonzero()[:, 0].int()
            for w in self.weights
        ]
        self.plan = SparsePlan(self.weights, self.indices)
        self.values = torch.cat([gather(*pair) for pair in zip(self.weights, self.indices, strict=True)])
        self.flat_grads = torch.empty_like(self.values)
        self.gather_gradients()
        self.moments = [torch.zeros_like(self.values) for _ in range(2)]
        self.masks = [
            torch.zeros(w.numel(), dtype=torch.bool, device=device)
            .index_fill_(0, i.long(), True)
            .view(w.shape)
            for w, i in zip(self.weights, self.indices, strict=True)
        ]
        self.flat = self.optimizer([self.values.clone()], [self.flat_grads], fused=True)
        parts = [self.values[segment].clone() for segment in self.plan.segments]
        self.parts = self.optimizer(
            parts, [self.flat_grads[segment] for segment in self.plan.segments], foreach=False
        )
        self.dense = {
            kind: self.optimizer([w.clone() for w in self.weights], self.grads, **{kind: True})
            for kind in ("fused", "foreach")
        }

    @staticmethod
    def optimizer(tensors: list[Tensor], grads: list[Tensor], **how: bool) -> torch.optim.Optimizer:
        """Return an AdamW over tensors that have these gradients."""
        parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return torch.optim.AdamW(parameters, **NUMBERS, **how)

    def sparse(self, backend: Any) -> None:
        """Make a step with a kept plan."""
        self.plan.adamw_(self.values, self.flat_grads, *self.moments, step=2, backend=backend, **NUMBERS)

    def sparse_anew(self) -> None:
        """Make a step by the plain function, which makes its plan first."""
        sparse_adamw_(
            self.weights, self.indices, self.values, self.flat_grads, *self.moments, step=2, **NUMBERS
        )

    def gather_gradients(self) -> None:
        """Gather what a backward pass leaves behind; part of no other row."""
        for grad, positions, segment in zip(self.grads, self.indices, self.plan.segments, strict=True):
            gather(grad, positions, out=self.flat_grads[segment])

    def flat_fused(self) -> None:
        """Make a step of torch's fused AdamW on the flat vector and scatter the result."""
        self.flat.step()
        (values,) = self.flat.param_groups[0]["params"]
        for weight, positions, segment in zip(self.weights, self.indices, self.plan.segments, strict=True):
            scatter_(weight, positions, values[segment])

    def masked(self) -> None:
        """Make a step as SaRA's published optimizer does: tensor by tensor, written through boolean masks."""
        self.parts.step()
        parts = self.parts.param_groups[0]["params"]
        for weight, mask, values in zip(self.weights, self.masks, parts, strict=True):
            weight[mask] = values.detach().to(weight.dtype)

    def rows(self) -> dict[str, Callable[[], object]]:
        """Return name and work of each row."""
        rows = {
            "dense fused": self.dense["fused"].step,
            "dense fused again": self.dense["fused"].step,
            "dense foreach": self.dense["foreach"].step,
            "sparse, torch": lambda: self.sparse("torch"),
            "sparse, plan made anew": self.sparse_anew,
            "flat fused AdamW, then scatter": self.flat_fused,
            "AdamW per tensor, boolean masks": self.masked,
            "gather the gradients": self.gather_gradients,
        }
        if self.plan.why_not_triton() is None:
            rows["sparse, triton"] = lambda: self.sparse("triton")
        return rows

    def state_bytes(self) -> dict[str, int]:
        """Return what each keeps between steps, weights and gradients apart."""
        total, chosen = sum(w.numel() for w in self.weights), self.plan.size
        dense = sum(
            state[name].nbytes
            for state in self.dense["fused"].state.values()
            for name in ("exp_avg", "exp_avg_sq")
        )
        kept = [self.values, *self.moments, *self.indices]
        return {
            "dense": dense,
            "sparse": sum(tensor.nbytes for tensor in kept),
            "AdamW per tensor, boolean masks": 12 * chosen + total,
        }


def check(case: Case) -> None:
    """Check a step of every backend against torch's AdamW and that nothing else moved."""
    exact = case.values.is_cpu
    for backend in ("torch", "triton") if case.plan.why_not_triton() is None else ("torch",):
        before = [weight.clone() for weight in case.weights]
        state = [case.values.clone(), case.flat_grads, *(torch.zeros_like(case.values) for _ in range(2))]
        wanted = Case.optimizer([case.values.clone()], [case.flat_grads], foreach=False)
        case.plan.adamw_(*state, step=1, backend=backend, **NUMBERS)
        wanted.step()
        (values,) = wanted.param_groups[0]["params"]
        # torch's own CUDA kernels may fuse a product and a sum: some units in the last place.
        torch.testing.assert_close(
            state[0], values.detach(), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-8
        )
        for weight, old, mask, segment in zip(
            case.weights, before, case.masks, case.plan.segments, strict=True
        ):
            assert torch.equal(weight[~mask], old[~mask])
            assert torch.equal(weight[mask], state[0][segment].to(weight.dtype))
            weight.copy_(old)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long some work took."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    work()
    return time.process_time() - began


def temporary_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most that some work holds of memory that it did not hold before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Return times, ratios and temporary memory of each row."""
    rows = case.rows()
    for work in rows.values():
        work()  # torch's optimizers make their state at the first step.
    peaks = {row: temporary_bytes(work, device) for row, work in rows.items()}
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row, work in rows.items():
            times[row].append(1000 * seconds(work, device))
    facts = {}
    for row, values in times.items():
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        ratios = [value / base for value, base in zip(values, times["dense fused"], strict=True)]
        facts[row] = {
            "median_ms": round(statistics.median(values), 3),
            "p20_ms": round(tenths[1], 3),
            "p80_ms": round(tenths[7], 3),
            "ratio_to_dense_fused": round(statistics.median(ratios), 3),
            "temporary_bytes": peaks[row],
        }
    return facts


def main() -> None:
    """Check, measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.15, 0.5])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    shapes = unet_shapes(args.width)
    cases = {}
    for share in args.shares:
        case = Case(shapes, share, device, dtype)
        check(case)
        rows = measure(case, device, args.rounds)
        cases[f"{share:.0%}"] = {
            "chosen": case.plan.size,
            "rows": rows,
            "state_bytes": case.state_bytes(),
            "why_not_triton": case.plan.why_not_triton(),
        }
    facts = {
        "tensors": len(shapes),
        "parameters": sum(shape.numel() for shape in shapes),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "cases": cases,
        **machine(args.device),
    }
    text = json.dumps(facts, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
