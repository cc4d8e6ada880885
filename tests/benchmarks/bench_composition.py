"""How well each composition method keeps what each adapter brings, in the spirit of ComposLoRA.

    python tests/benchmarks/bench_composition.py            # the grid for a CPU; call again to go on
    python tests/benchmarks/bench_composition.py --full     # all pairs and triples, 5 seeds
    python tests/benchmarks/bench_composition.py --base MODEL --results FILE --work FOLDER    # another base
    python tests/benchmarks/bench_composition.py --into docs/composing-results.md    # the tables, no work
    python tests/benchmarks/bench_composition.py --sheet sheet.png

Adapters are trained on what the embedded base was never shown: subjects, styles and backgrounds. A set is
a subject with a style, a background or both; fours and fives add subjects that the prompt does not name,
whose adapters can only disturb. Every method draws every set with the same prompts and seeds, and the
evaluator says whether the picture has the subject, the style and the background that the prompt names. Every
finished cell is a line of the results; what is there already is not done again.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_train_cost import machine
from methods_tables import FOLDER, filled, markdown, measured_on
from PIL import Image, ImageOps

import studio
from studio.assets.builder.captions import with_article
from studio.assets.builder.evaluator import Verdict, judge
from studio.assets.builder.examples import example
from studio.assets.builder.measure import grid, wilson
from studio.assets.builder.subjects import (
    BACKGROUNDS,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_STYLES,
    HELD_OUT_SUBJECTS,
)
from studio.errors import CompositionError
from studio.presets import preset
from studio.registry import COMPOSERS

RESULTS = FOLDER / "composition.jsonl"
LESSONS = ("fox", "owl", "apple", "rocket", "turtle", "guitar", "house", "butterfly")
"""Subjects of the pictures that styles and backgrounds are learned from."""
TRIGGERS = {"subject": "sks {0}", "style": "zwx {0}", "background": "qvb {0}"}
STEPS = 20
METHODS: dict[str, tuple[str, Mapping[str, Any], float]] = {
    "merge": ("merge", {}, 1.0),
    "merge: ties": ("merge", {"how": "ties"}, 1.0),
    "merge: lego": ("merge", {"how": "lego"}, 1.0),
    "switch": ("switch", {"switch_every": 1}, 1.0),
    "switch at 1.5": ("switch", {"switch_every": 1}, 1.5),
    "w-switch": ("w-switch", {"switch_every": 2, "final_steps": 2}, 1.0),
    "composite": ("composite", {}, 1.0),
    "composite at 1.5": ("composite", {}, 1.5),
    "composite: own text": ("composite", {"text_encoder_policy": "own"}, 1.0),
    "w-composite": ("w-composite", {}, 1.0),
    "klora": ("klora", {}, 1.0),
    "cmlora": ("cmlora", {}, 1.0),
}
"""Rows of the table: a method, its options, and the weight of every adapter.

Turns are short because runs are (20 steps). What acts for a part of the time or of the answer is tried at a
higher weight, too.
"""

SUBJECTS = [("subject", subject.name) for subject in HELD_OUT_SUBJECTS]
STYLES = [("style", style) for style in HELD_OUT_STYLES]
GROUNDS = [("background", ground) for ground in HELD_OUT_BACKGROUNDS]

KINDS = ("subject", "style", "background")
Kinds = Mapping[str, str]


@dataclass(frozen=True)
class Workplace:
    """Where the work is done.

    Attributes:
        base: Name or folder of the model.
        folder: Of adapters and pictures, of this base alone.
        device: As the studio names it.
    """

    base: str
    folder: Path
    device: str


@dataclass(frozen=True)
class Set:
    """Adapters in one picture.

    Attributes:
        asked: What the prompt names: by kind ("subject", "style", "background") the thing.
        others: Subjects whose adapters are there but that the prompt does not name.
    """

    asked: tuple[tuple[str, str], ...]
    others: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of adapters."""
        return len(self.asked) + len(self.others)

    @property
    def name(self) -> str:
        """What the results call it."""
        return "+".join([*(thing for _, thing in self.asked), *self.others])

    @property
    def adapters(self) -> list[tuple[str, str]]:
        """Kind and thing of each adapter, in the paper's order: subjects, style, background."""
        return [*self.asked[:1], *(("subject", other) for other in self.others), *self.asked[1:]]

    def wanted(self) -> Kinds:
        """Return what a right picture shows; backgrounds and styles that no adapter brings are the base's."""
        return {"subject": LESSONS[0], "style": "plain", "background": "white", **dict(self.asked)}

    def prompt(self) -> str:
        """Return the prompt, each adapter's thing by its trigger words."""
        return caption({kind: TRIGGERS[kind].format(thing) for kind, thing in self.asked})


def caption(words: Kinds) -> str:
    """Return the words for a picture."""
    subject = words.get("subject", "fox")
    ground = f"on a {words.get('background', 'white')} background"
    if "style" in words:
        named = subject if subject.startswith("sks") else with_article(subject)
        return f"a {words['style']} picture of {named} {ground}"
    return f"a photo of {subject if subject.startswith('sks') else with_article(subject)} {ground}"


def write_pictures(kind: str, thing: str, folder: Path) -> None:
    """Render what one adapter learns from, each picture with its caption."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    grounds = list(BACKGROUNDS)
    for number, lesson in enumerate(LESSONS):
        shown = {
            "subject": lesson,
            "style": "plain",
            "background": grounds[number % len(grounds)],
            kind: thing,
        }
        words = {"subject": lesson, "background": shown["background"], kind: TRIGGERS[kind].format(thing)}
        picture = example(shown["subject"], shown["style"], shown["background"], rng)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(words))


def trained(kind: str, thing: str, work: Workplace) -> Path:
    """Return the file of an adapter, trained now if it is not there."""
    path = work.folder / "adapters" / f"{kind}-{thing}.safetensors"
    if not path.is_file():
        write_pictures(kind, thing, work.folder / "data" / thing)
        studio.train(
            studio.TrainSpec.model_validate(
                preset("starter")
                | {
                    "base": work.base,
                    "data": work.folder / "data" / thing,
                    "output": path,
                    "overwrite": True,
                    "method": "lora",
                    "device": work.device,
                }
            )
        )
    return path


def singles(chosen: Sequence[Set]) -> list[Set]:
    """Return every adapter of these sets alone: what methods can keep of it at most."""
    return [Set((pair,)) for pair in dict.fromkeys(pair for each in chosen for pair in each.adapters)]


def sets(full: bool) -> list[Set]:
    """Return what is drawn: for a CPU 6 pairs, 4 triples and 2 fours, or all pairs and triples."""
    if full:
        pairs = [Set(pair) for pair in itertools.product(SUBJECTS, [*STYLES, *GROUNDS])]
        triples = [Set(triple) for triple in itertools.product(SUBJECTS, STYLES, GROUNDS)]
        more = [Set(triple.asked, strangers(triple)[:count]) for count in (1, 2) for triple in triples]
        return [*pairs, *triples, *more]
    # Every style and every background with some subject, in turn.
    others, styles, grounds = map(itertools.cycle, ([*STYLES, *GROUNDS], STYLES, GROUNDS))
    pairs = [Set((subject, next(others))) for subject in SUBJECTS[:6]]
    triples = [Set((subject, next(styles), next(grounds))) for subject in SUBJECTS[:4]]
    fours = [Set(triple.asked, strangers(triple)[4:5]) for triple in triples[:2]]
    return [*pairs, *triples, *fours]


def strangers(chosen: Set) -> tuple[str, ...]:
    """Return the subjects that a set has not."""
    return tuple(each.name for each in HELD_OUT_SUBJECTS if ("subject", each.name) not in chosen.asked)


def draw(chosen: Set, row: str, seeds: Sequence[int], work: Workplace) -> dict[str, Any]:
    """Draw and judge one set with one method; return its line of the results and leave its pictures."""
    method, options, weight = METHODS.get(row, METHODS["merge"])
    paths = [] if row == "base" else [trained(kind, thing, work) for kind, thing in chosen.adapters]
    pipe = studio.load_base(work.base, device=work.device)
    adapters = {path.stem: studio.load_adapter(path, base=pipe) for path in paths}
    if "triggers" in COMPOSERS[method].Options.model_fields:
        words = {f"{kind}-{thing}": TRIGGERS[kind].format(thing) for kind, thing in chosen.adapters}
        options = {**options, "triggers": words}
    start, pictures = time.process_time(), []
    weights = dict.fromkeys(adapters, weight)
    with studio.compose(pipe, adapters, weights=weights, method=method, options=options) as composition:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            pictures += pipe(chosen.prompt(), num_inference_steps=STEPS, generator=generator).images
    seconds = (time.process_time() - start) / len(seeds)
    for seed, picture in zip(seeds, pictures, strict=True):
        picture.save(work.folder / f"{row}-{chosen.name}-{seed}.png".replace(": ", "-"))
    return {
        "right": [score(chosen, verdict) for verdict in judge(pictures)],
        "cpu_seconds": round(seconds, 2),
        "evaluations": composition.passes.full / (2 * STEPS * len(seeds)),
        "shallow": composition.passes.shallow / (2 * STEPS * len(seeds)),
    }


def score(chosen: Set, seen: Verdict) -> dict[str, bool]:
    """Return for each kind whether a picture shows what it should."""
    return {kind: getattr(seen, kind) == thing for kind, thing in chosen.wanted().items()}


def cells(full: bool) -> Iterator[tuple[Set, str]]:
    """Go through sets and methods, a set with all methods before the next; first each adapter alone."""
    rows = ["base", *(row for row, (method, *_) in METHODS.items() if method in COMPOSERS.names())]
    chosen = sets(full)
    alone = itertools.product(singles(chosen), ["base", "merge"])
    return itertools.chain(alone, itertools.product(chosen, rows))


def key(chosen: Set, row: str, seeds: Sequence[int]) -> str:
    """Return the name of a cell in the results."""
    return f"{row}/{chosen.name}/{seeds[0]}-{seeds[-1]}/{STEPS}"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the results by cell; the last one of a cell counts."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line["cell"]: line for line in map(json.loads, lines)}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each number of adapters: what is right of what they bring, and the cost."""
    head = ("method", *KINDS, "all of these", "rest", "evaluations a step", "CPU s")
    parts = []
    for size in sorted({line["size"] for line in lines}):
        own = [line for line in lines if line["size"] == size]
        rows = [
            summary(row, [line for line in own if line["row"] == row])
            for row in ("base", *METHODS)
            if any(line["row"] == row for line in own)
        ]
        count = sum(len(line.get("right", ())) for line in own if line["row"] == "base")
        adapters = "1 adapter" if size == 1 else f"{size} adapters"
        parts.append(f"{adapters}, {count} pictures a method:\n\n{markdown(head, rows)}")
    return "\n\n".join([*parts, measured_on(lines[-1])])


def summary(row: str, lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a row of the table."""
    if refused := [line["refused"] for line in lines if "refused" in line]:
        return (row, f"refused: {refused[0]}", "", "", "", "", "", "")
    brought: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    whole, rest = [], []
    for line in lines:
        kinds = kinds_of(line["set"])
        for right in line["right"]:
            for kind in KINDS:
                (brought[kind] if kind in kinds else rest).append(right[kind])
            whole.append(all(right[kind] for kind in kinds))
    cost = sum(line["evaluations"] for line in lines) / len(lines)
    shallow = sum(line["shallow"] for line in lines) / len(lines)
    seconds = sorted(line["cpu_seconds"] for line in lines)[len(lines) // 2]
    return (
        row,
        *(share(brought[kind]) for kind in KINDS),
        share(whole),
        share(rest),
        f"{cost:.2f}" + (f" + {shallow:.2f} shallow" if shallow else ""),
        f"{seconds:.1f}",
    )


def kinds_of(name: str) -> set[str]:
    """Return the kinds of things that a set brings, by its name."""
    kinds = {thing: kind for kind, thing in (*SUBJECTS, *STYLES, *GROUNDS)}
    return {kinds[thing] for thing in name.split("+")}


def insert(text: str, results: Path) -> str:
    """Return a document with the tables between its marks."""
    return filled(text, {"fidelity": table(list(read(results).values()))})


def share(right: Sequence[bool]) -> str:
    """Return how many of how many, and the percentage's 95 % interval."""
    if not right:
        return ""
    low, high = wilson(sum(right), len(right))
    return f"{sum(right)} of {len(right)} [{max(0, 100 * low):.0f} .. {100 * high:.0f} %]"


def sheet(full: bool, seed: int, work: Path, path: Path) -> None:
    """Draw a row for each method, a column for each set."""
    chosen = sets(full)
    rows = ["base", *METHODS]
    tiles = [
        ImageOps.contain(
            Image.open(work / f"{row}-{each.name}-{seed}.png".replace(": ", "-")).convert("RGB"), (96, 96)
        )
        for row in rows
        if all((work / f"{row}-{each.name}-{seed}.png".replace(": ", "-")).is_file() for each in chosen)
        for each in chosen
    ]
    grid(tiles, columns=len(chosen)).quantize(128).save(path, optimize=True)


def main() -> None:
    """Fill the results, or print the tables that they give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the grid for a GPU")
    parser.add_argument("--into", type=Path, help="a document whose tables are replaced; does no work")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet and do no work")
    parser.add_argument("--base", default="starter", help="name or folder of an embedded base model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of one base")
    parser.add_argument("--work", type=Path, default=Path("out") / "bench_composition", help="of one base")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(5 if args.full else 2)
    if args.sheet:
        sheet(args.full, seeds[0], args.work, args.sheet)
        return
    if args.into:
        args.into.write_text(insert(args.into.read_text(), args.results))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for chosen, row in cells(args.full):
        name = key(chosen, row, seeds)
        if name in read(args.results):
            continue
        line = {
            "cell": name,
            "row": row,
            "set": chosen.name,
            "size": chosen.size,
            "base": Path(args.base).name,
        }
        try:
            line |= draw(chosen, row, seeds, Workplace(args.base, args.work, args.device))
        except CompositionError as error:
            line["refused"] = str(error).split(". ")[0]
        with args.results.open("a") as file:
            file.write(json.dumps({**line, **machine()}) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
