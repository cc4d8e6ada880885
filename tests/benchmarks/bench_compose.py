"""What composing costs beside diffusers and peft: time and operations of a denoiser step, and of a switch.

    python tests/benchmarks/bench_compose.py
    python tests/benchmarks/bench_compose.py --table        # the table of docs/composing-cost.md

The model is a random UNet of 56 M parameters with 128 attention projections, latents 4 x 32 x 32, fp32, one
thread, a guided batch of 2. A provider makes whole runs of eight steps, weights that are formed for the first
time included; rounds are interleaved and times are CPU seconds of a step: median, p20 and p80 of the ratios
to "base" round by round; "base again" is the noise floor. Operations are those of the fifth step. What rivals
do is written here anew: LoRA layers of peft beside the weights, ``set_adapters`` at every step, fusing and
unfusing, and Composite with one evaluation after the other.

Checked first: the studio's merged weights and peft's layers give the same answer.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_train_cost import machine
from methods_tables import FOLDER, markdown
from torch.utils._python_dispatch import TorchDispatchMode
from train_worker import make_pipe

import studio
from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.live import LiveLayers
from studio.adapters.parameters import canonical_names, components_of

RESULTS = FOLDER / "compose_cost.json"
STEPS = 8
MOST = 8

Step = Callable[[Any, Any], torch.Tensor]
Provider = Callable[["Bench"], Any]


class Counter(TorchDispatchMode):
    """Count operations, views left out: a stand-in for kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class Bench:
    """The two pipelines, adapters and inputs of all providers.

    Args:
        rank: Of the adapters.
    """

    def __init__(self, rank: int = 8) -> None:
        self.ours, self.rival = make_pipe("random"), make_pipe("random")
        for pipe in (self.ours, self.rival):
            pipe._guidance_scale = 5.0
        self.adapters = {f"a{i}": random_adapter(self.ours, f"a{i}", seed=i, rank=rank) for i in range(MOST)}
        with tempfile.TemporaryDirectory() as folder:
            for name, adapter in self.adapters.items():
                path = Path(folder) / f"{name}.safetensors"
                studio.save_adapter(adapter, path, format="diffusers", dtype=torch.float32)
                self.rival.load_lora_weights(folder, weight_name=path.name, adapter_name=name)
        self.rival.disable_lora()
        generator = torch.Generator().manual_seed(0)
        self.sample = torch.randn(2, 4, 32, 32, generator=generator)
        self.text = torch.randn(2, 77, 256, generator=generator)

    def some(self, number: int) -> dict[str, Adapter]:
        """Return the first adapters."""
        return dict(list(self.adapters.items())[:number])

    def forward(self, pipe: Any, timestep: Any) -> torch.Tensor:
        """Evaluate a denoiser."""
        answer: torch.Tensor = pipe.unet(self.sample, timestep, self.text, return_dict=False)[0]
        return answer

    def run(self, pipe: Any, step: Step) -> float:
        """Make a run and return its CPU seconds a step."""
        pipe.scheduler.set_timesteps(STEPS)
        latents = self.sample[:1]
        start = time.process_time()
        for timestep in pipe.scheduler.timesteps:
            answer = step(pipe, timestep)
            latents = pipe.scheduler.step(answer[1:], timestep, latents).prev_sample
        return (time.process_time() - start) / STEPS

    def operations(self, pipe: Any, step: Step) -> int:
        """Return the operations of the fifth step of a run, when all that is kept has been formed."""
        pipe.scheduler.set_timesteps(STEPS)
        *before, last = pipe.scheduler.timesteps[:5]
        for timestep in before:
            pipe.scheduler.step(step(pipe, timestep)[1:], timestep, self.sample[:1])
        with Counter() as counter:
            step(pipe, last)
        return counter.count


def random_adapter(pipe: Any, name: str, *, seed: int, rank: int) -> Adapter:
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
        if ".attn" in key and key.endswith(".weight") and "norm" not in key
    }
    return Adapter(name, "lora", changes)


@contextmanager
def base(bench: Bench) -> Iterator[tuple[Any, Step]]:
    """The plain denoiser."""
    yield bench.ours, bench.forward


def composed(method: str, number: int, **settings: Any) -> Provider:
    """Return the studio's composition of some adapters."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[tuple[Any, Step]]:
        weights = {name: 1 / number for name in bench.some(number)} if method == "merge" else None
        with studio.compose(bench.ours, bench.some(number), method=method, weights=weights, **settings):
            yield bench.ours, bench.forward

    return provide


def live(number: int) -> Provider:
    """Return low-rank layers beside the weights, all adapters of a layer stacked."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[tuple[Any, Step]]:
        names = list(bench.adapters["a0"].changes)
        with LiveLayers(components_of(bench.ours), names) as layers:
            layers.apply(
                {
                    name: [(one.changes[name], 1 / number) for one in bench.some(number).values()]
                    for name in names
                }
            )
            yield bench.ours, bench.forward

    return provide


def unmerged(number: int) -> Provider:
    """Return peft's layers beside the weights."""

    @contextmanager
    def provide(bench: Bench) -> Iterator[tuple[Any, Step]]:
        bench.rival.enable_lora()
        bench.rival.set_adapters(list(bench.some(number)), [1 / number] * number)
        yield bench.rival, bench.forward
        bench.rival.disable_lora()

    return provide


@contextmanager
def set_adapters(bench: Bench) -> Iterator[tuple[Any, Step]]:
    """LoRA Switch with peft: another adapter at every step."""
    turn = iter(range(10**9))

    def step(pipe: Any, timestep: Any) -> torch.Tensor:
        pipe.set_adapters([f"a{next(turn) % 3}"])
        return bench.forward(pipe, timestep)

    bench.rival.enable_lora()
    yield bench.rival, step
    bench.rival.disable_lora()


@contextmanager
def fusing(bench: Bench) -> Iterator[tuple[Any, Step]]:
    """LoRA Switch by fusing and unfusing at every step."""
    turn = iter(range(10**9))

    def step(pipe: Any, timestep: Any) -> torch.Tensor:
        pipe.fuse_lora(adapter_names=[f"a{next(turn) % 3}"])
        answer = bench.forward(pipe, timestep)
        pipe.unfuse_lora()
        return answer

    bench.rival.enable_lora()
    bench.rival.set_adapters(["a0", "a1", "a2"])
    yield bench.rival, step
    bench.rival.disable_lora()


@contextmanager
def one_after_the_other(bench: Bench) -> Iterator[tuple[Any, Step]]:
    """LoRA Composite of three as published: an evaluation for each, toggled by peft."""

    def step(pipe: Any, timestep: Any) -> torch.Tensor:
        answers = []
        for number in range(3):
            pipe.set_adapters([f"a{number}"])
            answers.append(bench.forward(pipe, timestep))
        return torch.stack(answers).mean(0)

    bench.rival.enable_lora()
    yield bench.rival, step
    bench.rival.disable_lora()


NONE = {"full_first": 0, "full_last": 0}
PROVIDERS: dict[str, Provider] = {
    "base": base,
    "base again": base,
    "merge of 3": composed("merge", 3),
    "live, 1": live(1),
    "live, 3": live(3),
    "live, 8": live(8),
    "peft unmerged, 1": unmerged(1),
    "peft unmerged, 3": unmerged(3),
    "peft unmerged, 8": unmerged(8),
    "switch at every step": composed("switch", 3, options={"switch_every": 1}),
    "switch, weights formed anew": composed("switch", 3, options={"switch_every": 1}, memory=0),
    "peft set_adapters at every step": set_adapters,
    "peft fuse and unfuse at every step": fusing,
    "composite of 3, one batch": composed("composite", 3),
    "composite of 3, a loop": composed("composite", 3, batched=False),
    "composite of 3, peft one after the other": one_after_the_other,
    "klora of 2": composed("klora", 2),
    "merge of 3, cache 1:3": composed("merge", 3, modifiers={"cache": {"interval": 3, **NONE}}),
    "cmlora of 3": composed("cmlora", 3),
}
"""What is measured."""


def check(bench: Bench) -> float:
    """Return the largest difference of merged weights and peft's layers."""
    with composed("merge", 3)(bench) as (pipe, step):
        own = step(pipe, 500)
    with unmerged(3)(bench) as (pipe, step):
        difference = float((own - step(pipe, 500)).abs().max())
    assert difference < 1e-3, difference
    return difference


def measure(bench: Bench, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Return operations, times and ratios to the base of providers."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, int] = {}
    for number in range(rounds):
        for name in names:
            with PROVIDERS[name](bench) as (pipe, step):
                if number == 0:
                    counts[name] = bench.operations(pipe, step)
                seconds[name].append(bench.run(pipe, step))
    return {
        name: {
            "operations": counts[name],
            "seconds": round(statistics.median(own), 4),
            **spread([mine / plain for mine, plain in zip(own, seconds["base"], strict=True)]),
        }
        for name, own in seconds.items()
    }


def switching(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of what happens between two steps, and of entering and leaving."""
    work: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.process_time()
        action()
        work.setdefault(name, []).append(1000 * (time.process_time() - start))

    for _ in range(rounds):
        _switch_once(bench, timed)
        bench.rival.enable_lora()
        timed("peft set_adapters", lambda: bench.rival.set_adapters(["a1"]))
        bench.rival.disable_lora()
    return {name: spread(values) for name, values in work.items()}


def _switch_once(bench: Bench, timed: Callable[[str, Callable[[], object]], None]) -> None:
    options = {"switch_every": 1}
    composition = studio.compose(bench.ours, bench.some(3), method="switch", options=options)
    with ExitStack() as entered:
        timed("enter, 3 adapters", lambda: entered.enter_context(composition))
        # A run, in which the weights of all three are formed.
        bench.run(bench.ours, bench.forward)
        for index in range(3):
            (branch,) = composition.plan.at(studio_step(index))
            timed("switch", partial(composition._executor.act, branch))
        timed("leave", entered.close)


def studio_step(index: int) -> Any:
    """Return a step of a run of three."""
    from studio.composition.plan import Step

    return Step(index, 3, index / 3)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, p20 and p80."""
    ordered = sorted(values)
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return {name: round(ordered[round(share * (len(ordered) - 1))], 3) for name, share in at.items()}


def table(facts: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = [
        (
            name,
            str(row["operations"]),
            f"{row['median']:.2f} [{row['p20']:.2f} .. {row['p80']:.2f}]",
            f"{row['seconds']:.3f}",
        )
        for name, row in facts["rows"].items()
    ]
    head = ("provider", "operations a step", "time against base [p20 .. p80]", "CPU s a step")
    between = [(name, middle(row)) for name, row in facts["milliseconds"].items()]
    measured = f"{facts['machine']}; {facts['date']}; commit {facts['commit']}; {facts['rounds']} rounds"
    return "\n\n".join([markdown(head, rows), markdown(("between two steps", "CPU ms"), between), measured])


def middle(row: Mapping[str, float]) -> str:
    """Return median and spread."""
    return f"{row['median']:.2f} [{row['p20']:.2f} .. {row['p80']:.2f}]"


def main() -> None:
    """Measure, write and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, help="beside the base")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and do no work")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        bench = Bench()
        difference = check(bench)
        wanted = args.only or list(PROVIDERS)
        rows = measure(bench, list(dict.fromkeys(["base", *wanted])), args.rounds)
        facts = {
            "rows": rows,
            "milliseconds": switching(bench, args.rounds),
            "largest_difference_to_peft": difference,
            "rounds": args.rounds,
            **machine(),
        }
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(json.loads(args.results.read_text())))


if __name__ == "__main__":
    main()
