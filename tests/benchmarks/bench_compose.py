"""What composing costs beside diffusers and peft: time and operations of a denoiser step, and of a switch.

    python tests/benchmarks/bench_compose.py                         # the table of methods
    python tests/benchmarks/bench_compose.py --scaling               # over adapters, rank and batch
    python tests/benchmarks/bench_compose.py --model sdxl --device cuda     # also sd1; full size, bf16
    python tests/benchmarks/bench_compose.py --into docs/composing-cost.md  # the tables, no work

The usual model is a random UNet of 56 M parameters with 128 attention projections, latents 4 x 32 x 32, fp32,
one thread, a guided batch of 2. A provider makes whole runs, weights that are formed for the first time
included; rounds are interleaved. Times are CPU seconds of a step, on a GPU seconds: median, p20 and p80 of
the ratios to "base" round by round; "base again" is the noise floor. Operations are those of a run's last
step. MACs are counted, those of low-rank layers beside the weights left out. See ``compose_providers`` for
what the rivals do.

Checked first: the studio's merged weights and peft's layers give the same answer. Checked last: after all
this the studio's weights are those that they were at the start, bit for bit.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train_cost import machine
from compose_providers import (
    LATENTS,
    Bench,
    Provider,
    Setting,
    base,
    composed,
    fusing,
    live,
    one_after_the_other,
    rival,
    set_adapters,
    unmerged,
)
from methods_tables import FOLDER, filled, markdown, measured_on

import studio
from studio.composition.cost import Cost, unet_macs
from studio.composition.plan import Step

RESULTS = FOLDER / "compose_cost.json"

CACHE = {"interval": 3, "full_first": 0, "full_last": 0}
EVERY = {"switch_every": 1}
PROVIDERS: dict[str, Provider] = {
    "base": base,
    "base again": base,
    "merge of 3": composed("merge", 3),
    "live, 1": live(1),
    "live, 3": live(3),
    "live, 8": live(8),
    "peft unmerged, 1": rival(unmerged, 1),
    "peft unmerged, 3": rival(unmerged, 3),
    "peft unmerged, 8": rival(unmerged, 8),
    "switch at every step": composed("switch", 3, options=EVERY),
    "switch, weights formed anew": composed("switch", 3, options=EVERY, memory=0),
    "peft set_adapters at every step": rival(set_adapters, 3),
    "peft fuse and unfuse at every step": rival(fusing, 3),
    "composite of 3, one batch": composed("composite", 3),
    "composite of 3, a loop": composed("composite", 3, batched=False),
    "composite of 3, peft one after the other": rival(one_after_the_other, 3),
    "klora of 2": composed("klora", 2),
    "base, cache 1:3": composed("merge", 0, modifiers={"cache": CACHE}),
    "merge of 3, cache 1:3": composed("merge", 3, modifiers={"cache": CACHE}),
    "merge of 3, last 30 % unguided": composed("merge", 3, modifiers={"skip-guidance": {"start": 0.7}}),
    "cmlora of 3, interval 3": composed(
        "cmlora", 3, options={"interval": 3, "roles": {"a0": "high", "a1": "high", "a2": "low"}}
    ),
}
"""What is measured."""


def ways(number: int) -> dict[str, Provider]:
    """Return what is compared where something is varied, for a number of adapters."""
    return {
        "base": base,
        "merged": composed("merge", number),
        "live": live(number),
        "peft unmerged": rival(unmerged, number),
    }


def points(setting: Setting) -> Iterator[tuple[str, int, Setting, dict[str, Provider]]]:
    """Go through what is varied: axis, value, setting and providers."""
    setting = replace(setting, steps=4)
    for number in (1, 2, 3, 5, 8):
        yield "adapters", number, setting, ways(number)
    for rank in (4, 16, 32, 64, 128):
        yield "rank", rank, replace(setting, rank=rank), ways(3)
    for batch in (1, 2, 4, 8):
        more = {"composite, one batch": composed("composite", 3)}
        yield "batch", batch, replace(setting, batch=batch), ways(3) | more


def check(bench: Bench) -> float:
    """Return the largest difference of merged weights and peft's layers, relative to the largest answer."""
    with composed("merge", 3)(bench) as ready:
        own = ready.step(ready.pipe, 500)
    with rival(unmerged, 3)(bench) as ready:
        difference = float((own - ready.step(ready.pipe, 500)).abs().max() / own.abs().max())
    assert difference < (1e-3 if own.dtype == torch.float32 else 0.1), difference
    return difference


def measure(bench: Bench, providers: Mapping[str, Provider], rounds: int) -> dict[str, dict[str, Any]]:
    """Return operations, times and ratios to the base of providers."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    counts: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, provider in providers.items():
            with provider(bench) as ready:
                if number == 0:
                    counts[name] = {"operations": bench.operations(ready.pipe, ready.step)}
                seconds[name].append(bench.run(ready.pipe, ready.step))
                if ready.composition is not None:
                    counts[name]["macs"] = round(macs_of(bench, ready.composition), 3)
    return {
        name: {
            **counts[name],
            "seconds": round(statistics.median(own), 4),
            **spread([mine / plain for mine, plain in zip(own, seconds["base"], strict=True)]),
        }
        for name, own in seconds.items()
    }


def macs_of(bench: Bench, composition: Any) -> float:
    """Return the MACs of the last run, relative to the base's."""
    side = LATENTS[bench.setting.model]
    return Cost(composition.passes, unet_macs(bench.ours.unet, side, side, composition.plan.cut)).ratio


def switching(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of what happens between two steps, and of entering and leaving."""
    work: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = bench.clock()
        action()
        work.setdefault(name, []).append(1000 * (bench.clock() - start))

    for _ in range(rounds):
        _switch_once(bench, timed)
        bench.rival.enable_lora()
        timed("peft set_adapters", lambda: bench.rival.set_adapters(["a1"]))
        bench.rival.disable_lora()
    return {name: spread(values) for name, values in work.items()}


def _switch_once(bench: Bench, timed: Callable[[str, Callable[[], object]], None]) -> None:
    composition = studio.compose(bench.ours, bench.some(3), method="switch", options=EVERY)
    with ExitStack() as entered:
        timed("enter, 3 adapters", lambda: entered.enter_context(composition))
        # A run, in which the weights of all three are formed.
        bench.run(bench.ours, bench.forward)
        for index in range(3):
            (branch,) = composition.plan.at(Step(index, 3, index / 3))
            timed("switch", partial(composition._executor.act, branch))
        timed("leave", entered.close)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, p20 and p80."""
    at = {"median": 50, "p20": 20, "p80": 80}
    return {name: round(float(np.percentile(values, share)), 3) for name, share in at.items()}


def in_words(row: Mapping[str, float]) -> str:
    """Return median and spread."""
    return f"{row['median']:.2f} [{row['p20']:.2f} .. {row['p80']:.2f}]"


def methods_table(facts: Mapping[str, Any]) -> str:
    """Return the methods and what happens between two steps as Markdown."""
    rows = [
        (
            name,
            str(row["operations"]),
            f"{row['macs']:.2f}" if "macs" in row else "",
            in_words(row),
            f"{row['seconds']:.3f}",
        )
        for name, row in facts["rows"].items()
    ]
    head = ("provider", "operations a step", "MACs", "time [p20 .. p80]", "s a step")
    between = [(name, in_words(row)) for name, row in facts["milliseconds"].items()]
    return "\n\n".join(
        [
            markdown(head, rows),
            markdown(("between two steps", "ms"), between),
            f"{measured_on(facts)} {facts['rounds']} rounds of {facts['setting']['steps']} steps.",
        ]
    )


def scaling_table(facts: Mapping[str, Any]) -> str:
    """Return one table an axis: a row for each value, a column for each provider."""
    parts = []
    for axis, values in facts["points"].items():
        names = list(next(iter(values.values())))[1:]
        rows = [
            (
                value,
                *(f"{in_words(providers[name])}, {providers[name]['operations']}" for name in names),
            )
            for value, providers in values.items()
        ]
        parts.append(markdown((axis, *names), rows))
    return "\n\n".join([*parts, f"{measured_on(facts)} {facts['rounds']} rounds."])


def restored(bench: Bench, before: Mapping[str, torch.Tensor]) -> None:
    """Raise AssertionError unless the studio's denoiser is what it was."""
    after = bench.ours.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def work(setting: Setting, rounds: int, only: Sequence[str]) -> dict[str, Any]:
    """Measure the methods."""
    bench = Bench(setting)
    before = {name: tensor.clone() for name, tensor in bench.ours.unet.state_dict().items()}
    difference = check(bench)
    wanted = {name: PROVIDERS[name] for name in dict.fromkeys(["base", *(only or PROVIDERS)])}
    facts = {"rows": measure(bench, wanted, rounds), "milliseconds": switching(bench, rounds)}
    restored(bench, before)
    return {**facts, "largest_difference_to_peft": difference, "setting": asdict(setting), "rounds": rounds}


def scale(setting: Setting, rounds: int) -> dict[str, Any]:
    """Measure the ways to add adapters along the axes."""
    found: dict[str, dict[str, Any]] = {}
    for axis, value, own, providers in points(setting):
        found.setdefault(axis, {})[str(value)] = measure(Bench(own), providers, rounds)
        print(axis, value, flush=True)
    return {"points": found, "setting": asdict(setting), "rounds": rounds}


def read(path: Path) -> dict[str, Any]:
    """Return what has been measured, by model and device, and "scaling" behind it."""
    return json.loads(path.read_text()) if path.is_file() else {}


def insert(text: str, results: Mapping[str, Any]) -> str:
    """Return a document with the tables that it has marks for."""
    tables = {
        name: scaling_table(facts) if "points" in facts else methods_table(facts)
        for name, facts in results.items()
        if f"<!-- {name} -->" in text
    }
    return filled(text, tables)


def main() -> None:
    """Measure, write and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random", choices=LATENTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, default=(), help="beside the base")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, help="a document whose tables are replaced; does no work")
    args = parser.parse_args()
    if args.into:
        args.into.write_text(insert(args.into.read_text(), read(args.results)))
        return
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    setting = Setting(args.model, args.device)
    facts = scale(setting, args.rounds) if args.scaling else work(setting, args.rounds, args.only)
    facts |= machine(args.device)
    name = f"{args.model} {args.device}" + (" scaling" if args.scaling else "")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(read(args.results) | {name: facts}, indent=2) + "\n")
    print(scaling_table(facts) if args.scaling else methods_table(facts))


if __name__ == "__main__":
    main()
