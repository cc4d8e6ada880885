"""What a training step costs in time and memory: the studio's methods, full AdamW and peft's own loop.

    python tests/benchmarks/bench_train_cost.py

The model is a random UNet of 56 M parameters with 128 attention projections, latents 2 x 4 x 32 x 32, fp32,
no checkpointing, one thread. Every provider is a process of its own, which runs whole steps when it is told
to, one after the other in rounds; those of the studio are inside its own training loop. Times are CPU seconds
of a step: median, p20, p80, and the median of the ratios to "full AdamW, fused" round by round; "full AdamW,
fused, again" is the noise floor. Memory is the most that is resident in a process while it trains (the
kernel's high-water mark, set back after the first step), less the same of a process that only runs the
forward pass without gradients. State is what is kept between steps beside the base's weights, with a gradient
for every trained number; "copies" are those to go back to.

Checked first: providers that see the same batch have the same first loss, because every method starts by
changing nothing.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from methods_tables import COST, cost_table
from train_worker import RANK, Provider

BASELINE = "full AdamW, fused"
FORWARD = "forward only"


PROVIDERS = {
    FORWARD: Provider("forward"),
    BASELINE: Provider("full", {"fused": True}),
    f"{BASELINE}, again": Provider("full", {"fused": True}),
    "full AdamW, foreach": Provider("full", {"foreach": True}),
    "full AdamW, torch's default": Provider("full"),
    "floor: both passes, no update": Provider("passes", {"frozen": False}),
    "floor: both passes, frozen": Provider("passes", {"frozen": True}),
    "peft's LoRA, rank 16": Provider("peft"),
    "studio lora, rank 16": Provider("studio", {"method": "lora", "rank": RANK}),
    "studio sara, 15 %": Provider("studio", {"method": "sara", "quantile": 0.15, "rank_weight": 0.0}),
    "studio sara, 15 %, rank term": Provider("studio", {"method": "sara", "quantile": 0.15}),
    "studio full": Provider("studio", {"method": "full"}),
}


class Process:
    """A worker as the main process sees it."""

    def __init__(self, provider: Provider, model: str) -> None:
        given = json.dumps([provider.kind, dict(provider.options)])
        command = [sys.executable, str(Path(__file__).with_name("train_worker.py")), given, model]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.read()

    def read(self) -> dict[str, Any]:
        """Return what the worker says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self._process.wait()}: {self._process.args}")
        found: dict[str, Any] = json.loads(line)
        return found

    def tell(self, word: str) -> None:
        """Send a word to the worker."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def step(self) -> dict[str, Any]:
        """Have the worker make a step."""
        self.tell("step")
        return self.read()

    def state(self) -> dict[str, int]:
        """Ask the worker what it keeps."""
        self.tell("state")
        return self.read()

    def end(self) -> None:
        """Have the worker end."""
        self.tell("end")
        self._process.wait()


def measure(
    model: str, providers: Mapping[str, Provider], rounds: int, *, baseline: str = BASELINE
) -> dict[str, dict[str, Any]]:
    """Return times, memory and state of providers, baseline and forward pass among them, on a model."""
    workers = {name: Process(provider, model) for name, provider in providers.items()}
    try:
        first = {name: worker.step()["loss"] for name, worker in workers.items()}
        check(providers, first)
        for worker in workers.values():
            worker.tell("forget")
        times: dict[str, list[float]] = {name: [] for name in workers}
        peaks: dict[str, int] = {}
        for _ in range(rounds):
            for name, worker in workers.items():
                told = worker.step()
                times[name].append(told["seconds"])
                peaks[name] = told["peak"]
        states = {name: worker.state() for name, worker in workers.items() if name != FORWARD}
    finally:
        for worker in workers.values():
            worker.end()
    return {name: row(name, baseline, times, peaks) | states.get(name, {}) for name in workers}


def row(
    name: str, baseline: str, times: Mapping[str, list[float]], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Return one provider's times and memory, beside the baseline's."""
    tenths = statistics.quantiles(times[name], n=10, method="inclusive")
    ratios = [value / base for value, base in zip(times[name], times[baseline], strict=True)]
    above = peaks[name] - peaks[FORWARD]
    return {
        "median_s": round(statistics.median(times[name]), 3),
        "p20_s": round(tenths[1], 3),
        "p80_s": round(tenths[7], 3),
        "time_ratio": round(statistics.median(ratios), 3),
        "peak_above_forward": above,
        "memory_ratio": round(above / (peaks[baseline] - peaks[FORWARD]), 3),
    }


def check(providers: Mapping[str, Provider], losses: Mapping[str, float]) -> None:
    """Check that who sees the same batch and caption has the same first loss, to rounding."""
    seen: dict[tuple[bool, bool], list[float]] = {}
    for name, loss in losses.items():
        # A new token makes another caption of the same words.
        of = providers[name].kind == "studio", "token" in providers[name].options
        seen.setdefault(of, []).append(loss)
    assert all(max(alike) <= min(alike) * (1 + 1e-4) for alike in seen.values()), losses


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a measurement on a device depends on beside its settings."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    gpu = [torch.cuda.get_device_name(device)] if device.startswith("cuda") else []
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": ", ".join(
            [*gpu, f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
        ),
        "versions": {package.__name__: str(package.__version__) for package in (torch, diffusers, peft)},
    }


def main() -> None:
    """Measure, write and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, help="beside baseline and forward pass")
    parser.add_argument("--results", type=Path, default=COST)
    parser.add_argument("--table", action="store_true", help="print the table and do no work")
    parser.add_argument("--model", choices=["random", "starter"], default="random")
    args = parser.parse_args()
    if args.table:
        print(cost_table(json.loads(args.results.read_text())))
    else:
        chosen = {
            name: provider
            for name, provider in PROVIDERS.items()
            if not args.only or name in (FORWARD, BASELINE, *args.only)
        }
        facts = {"model": args.model, "rounds": args.rounds, "rows": measure(args.model, chosen, args.rounds)}
        facts |= machine()
        args.results.write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
