"""What composing costs beside diffusers and peft: operations and time per forward, and time per switch.

python tests/benchmarks/bench_compose.py --rounds 7 --json compose.json

Checks first that both draw the same. Rounds are interleaved; each row gives median, p20 and p80, and
"base again" is the noise floor.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import studio
from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.parameters import canonical_names, components_of


class Counter(TorchDispatchMode):
    """Count operations, views left out: a stand-in for kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def random_adapter(pipe: Any, name: str, *, seed: int, rank: int = 8) -> Adapter:
    """Return a LoRA on all attention projections of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    shapes = canonical_names({"unet": components_of(pipe)["unet"]})
    changes = {
        key: LoraChange(
            torch.randn(rank, shape[1], generator=generator) * 0.05,
            torch.randn(shape[0], rank, generator=generator) * 0.05,
            float(rank),
        )
        for key, shape in shapes.items()
        if ".attn" in key and key.endswith(".weight")
    }
    return Adapter(name, "lora", changes)


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, p20 and p80 in milliseconds."""
    ordered = sorted(1000 * value for value in seconds)
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: round(ordered[round(share * (len(ordered) - 1))], 3) for name, share in at.items()}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    ours, rival = (studio.load_base("starter", device="cpu", precision="fp32") for _ in range(2))
    adapters = {f"a{i}": random_adapter(ours, f"a{i}", seed=i) for i in range(args.adapters)}
    weights = dict.fromkeys(adapters, 1 / len(adapters))
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in adapters.items():
            path = studio.save_adapter(
                adapter, Path(folder) / f"{name}.safetensors", format="diffusers", dtype=torch.float32
            )
            rival.load_lora_weights(folder, weight_name=path.name, adapter_name=name)
    rival.set_adapters(list(adapters), list(weights.values()))

    size = ours.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, ours.unet.config.in_channels, size, size, generator=generator)
    text = torch.randn(2, 77, ours.unet.config.cross_attention_dim, generator=generator)

    def forward(pipe: Any) -> torch.Tensor:
        result: torch.Tensor = pipe.unet(sample, 500, text).sample
        return result

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def counted(pipe: Any) -> int:
        with Counter() as counter:
            forward(pipe)
        return counter.count

    times: dict[str, list[float]] = {}
    counts = {"base": counted(ours), "peft unmerged": counted(rival)}
    names = list(adapters)
    composed = studio.compose(ours, adapters, weights=weights)
    for _ in range(args.rounds):
        for row in ("base", "base again"):
            times.setdefault(row, []).append(timed(lambda: forward(ours)))
        times.setdefault("switch: enter and leave compose", []).append(
            timed(lambda: composed.__enter__() and composed.__exit__(None, None, None))
        )
        with composed:
            difference = float((forward(ours) - forward(rival)).abs().max())
            assert difference < 1e-3, difference
            counts["merge"] = counted(ours)
            times.setdefault("merge", []).append(timed(lambda: forward(ours)))
        times.setdefault("peft unmerged", []).append(timed(lambda: forward(rival)))
        times.setdefault("switch: peft set_adapters", []).append(timed(lambda: rival.set_adapters(names[0])))
        rival.set_adapters(names, list(weights.values()))

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts = {
        "adapters": len(adapters),
        "operations_per_forward": counts,
        "milliseconds": {row: spread(values) for row, values in times.items()},
        "largest_difference_to_peft": difference,
        "machine": machine,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
        },
    }
    text_out = json.dumps(facts, indent=2)
    if args.json:
        args.json.write_text(text_out + "\n")
    print(text_out)


if __name__ == "__main__":
    main()
