"""What every training method wins and costs on the embedded starter: success, forgetting, size, time, memory.

    python tests/benchmarks/bench_methods.py            # the grid for a CPU; call again to go on
    python tests/benchmarks/bench_methods.py --full     # all methods, subjects and styles, 3 seeds
    python tests/benchmarks/bench_methods.py --table    # the tables of docs/methods.md

A cell is one method on one held-out subject or style with one seed: the same rendered pictures, steps and
batch for all, and the rate that ``SETTINGS`` declares. Then pictures are drawn with the adapter, and the
evaluator says in how many it finds the subject (or the style, on subjects that were not in the training
pictures). Other prompts, of things that the base knows, are drawn with and without it from the same noise.
Every finished cell is a line of the results; what is there already is not done again. The last cell is the
cost of a step of each method on this base, in processes of their own (``bench_train_cost``).
"""

import argparse
import hashlib
import json
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train_cost import FORWARD, machine, measure
from methods_tables import METHODS, methods_table
from PIL import Image
from train_worker import Provider

import studio
from studio.assets.builder.captions import with_article
from studio.assets.builder.evaluator import Verdict, judge
from studio.assets.builder.examples import example
from studio.assets.builder.measure import grid, labelled_prompts
from studio.assets.builder.subjects import BACKGROUNDS, HELD_OUT_STYLES, HELD_OUT_SUBJECTS
from studio.registry import TRAINERS
from studio.specs import settable

LESSONS = ("fox", "owl", "apple", "rocket", "turtle", "guitar", "house", "butterfly")
"""Subjects of the pictures that a style is learned from."""
EXAMINED = ("cat", "whale", "cactus", "pizza", "car", "mushroom")
"""Subjects that it is asked for with."""


@dataclass(frozen=True)
class Setting:
    """How a method is run.

    Attributes:
        method: Its name in the registry.
        learning_rate: Of UNet and text encoder.
        why: Of the rate.
        options: Of the method.
    """

    method: str
    learning_rate: float
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the method and its options; text encoders learn where they can."""
        more = (
            {"train_text_encoder": True}
            if "train_text_encoder" in settable(studio.TrainSpec, self.method)
            else {}
        )
        return {"method": self.method, **more, **self.options}


SETTINGS = {
    "full": Setting("full", 1e-4, "a tenth of LoRA's: every weight moves"),
    "sara": Setting("sara", 5e-3, "few weights move, all of them small", {"quantile": 0.05}),
    "lora": Setting("lora", 1e-3, "the demo's", {"rank": 8}),
    "sara, slower": Setting("sara", 2e-3, "does less forgetting cost success?", {"quantile": 0.05}),
    "lora, slower": Setting("lora", 5e-4, "the same question", {"rank": 8}),
    "lokr": Setting("lokr", 5e-3, "few numbers, each of which acts on many weights"),
    "dora": Setting("dora", 1e-3, "LoRA's", {"rank": 8}),
    "pissa": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "init": "pissa"}),
    "loha": Setting("loha", 3e-3, "a product of two products starts slowly", {"rank": 8}),
    "oft": Setting("oft", 1e-2, "angles, not weights"),
    "vera": Setting("vera", 3e-2, "two vectors between fixed matrices"),
    "rslora": Setting("lora", 5e-4, "its factor at rank 8 is 2.8 times LoRA's", {"rank": 8, "rslora": True}),
    "locon": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "targets": "all"}),
    "lora+": Setting("lora", 5e-4, "up matrices at twice LoRA's", {"rank": 8, "lora_plus_ratio": 4}),
    "lora-fa": Setting("lora", 2e-3, "half of the matrices learn", {"rank": 8, "freeze_down": True}),
    "moslora": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "moslora": True}),
    "lora-ga": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "init": "lora-ga"}),
    "eva": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "init": "eva"}),
    "textual inversion": Setting("textual-inversion", 5e-3, "its own", {"token": "sks"}),
    "pivotal": Setting("lora", 1e-3, "LoRA's", {"rank": 8, "token": "sks", "token_until": 0.5}),
}
CORE = ("full", "sara", "lora", "lokr")
"""Methods that the small grid tries on all of its tasks; the others on the first."""


@dataclass(frozen=True)
class Course:
    """What is the same for all methods.

    Attributes:
        steps: Of training.
        batch_size: Of training.
        draw_steps: Denoising steps of the pictures that are judged.
        seeds: Pictures of each of the six own prompts.
        others: Other prompts.
    """

    steps: int = 300
    batch_size: int = 2
    draw_steps: int = 12
    seeds: int = 2
    others: int = 24


@dataclass(frozen=True)
class Cell:
    """One adapter to train and judge.

    Attributes:
        name: In ``SETTINGS``, or "base" for no adapter.
        task: A held-out subject or style.
        seed: Of pictures and training.
        course: What is the same for all.
    """

    name: str
    task: str
    seed: int
    course: Course

    @property
    def key(self) -> str:
        """Name of the cell in the results; another setting is another cell."""
        setting = SETTINGS.get(self.name)
        facts = json.dumps(
            [asdict(self.course), setting and [setting.method, setting.learning_rate, dict(setting.options)]]
        )
        return f"{self.name}/{self.task}/{self.seed}/{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    @property
    def is_style(self) -> bool:
        """Whether a style is learned."""
        return self.task in HELD_OUT_STYLES

    def caption(self, subject: str, ground: str) -> str:
        """Return the words for a picture of what is learned."""
        if self.is_style:
            return f"a sks {self.task} picture of {with_article(subject)} on a {ground} background"
        return f"a photo of sks {self.task} on a {ground} background"

    def prompts(self) -> list[str]:
        """Return six prompts for what was learned."""
        return [self.caption(*pair) for pair in zip(EXAMINED, BACKGROUNDS, strict=True)]

    def hits(self, verdicts: Sequence[Verdict]) -> int:
        """Count the pictures that show what was learned."""
        return sum(self.task == (seen.style if self.is_style else seen.subject) for seen in verdicts)


def write_pictures(cell: Cell, folder: Path) -> None:
    """Render what an adapter learns from, each picture with its caption."""
    rng = random.Random(1000 * cell.seed + 11)
    grounds = list(BACKGROUNDS)
    folder.mkdir(parents=True, exist_ok=True)
    for number, lesson in enumerate(LESSONS if cell.is_style else LESSONS[: len(grounds)]):
        ground = grounds[number % len(grounds)]
        subject, style = (lesson, cell.task) if cell.is_style else (cell.task, "plain")
        example(subject, style, ground, rng).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(cell.caption(subject, ground))


def train(cell: Cell, folder: Path, device: str) -> studio.TrainResult:
    """Train the adapter of a cell."""
    setting = SETTINGS[cell.name]
    write_pictures(cell, folder / "data")
    given = {
        "base": "starter",
        "data": folder / "data",
        "output": folder / "adapter.safetensors",
        "overwrite": True,
        "steps": cell.course.steps,
        "batch_size": cell.course.batch_size,
        "learning_rate": setting.learning_rate,
        "text_encoder_learning_rate": setting.learning_rate,
        "seed": cell.seed,
        "device": device,
    }
    return studio.train(studio.TrainSpec.model_validate(given | setting.chosen))


def belonging(result: studio.TrainResult, method: str) -> list[Path]:
    """Return the files that draw what was learned: the adapter's own, and what it does not hold."""
    parts = [result.parts[word] for word in TRAINERS[method].companions if word in result.parts]
    return [result.path, *parts]


def draw(cell: Cell, adapters: Mapping[Path, float], device: str) -> dict[str, list[Image.Image]]:
    """Return pictures of what was learned and of other things."""
    settings = {"adapters": adapters, "steps": cell.course.draw_steps, "batch_size": 12, "device": device}
    own = studio.generate_batch(cell.prompts(), seeds=range(cell.course.seeds), **settings)
    others = studio.generate_batch([row[0] for row in others_of(cell)], seeds=[5], **settings)
    return {"own": [one.image for one in own], "others": [one.image for one in others]}


def others_of(cell: Cell) -> list[tuple[str, str, str, str]]:
    """Return prompts of things that the base knows, with subject, style and background."""
    return labelled_prompts(cell.course.others, seed=77)


def files(folder: Path, kind: str) -> list[Path]:
    """Return the pictures that a cell left."""
    return sorted(folder.glob(f"{kind}-*.png"))


def run(cell: Cell, work: Path, device: str) -> dict[str, Any]:
    """Train, draw and judge one cell, leave its pictures, and return its line of the results."""
    folder = work / cell.key.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, adapters = time.process_time(), {}
    line: dict[str, Any] = {"cell": cell.key, "method": cell.name, "task": cell.task, "seed": cell.seed}
    line["course"] = asdict(cell.course)
    if cell.name != "base":
        result = train(cell, folder, device)
        adapters = {path: 1.0 for path in belonging(result, SETTINGS[cell.name].method)}
        line |= {
            "learning_rate": SETTINGS[cell.name].learning_rate,
            "options": dict(SETTINGS[cell.name].options),
            "loss": round(statistics.mean(result.losses[-50:]), 5),
            "file_bytes": sum(path.stat().st_size for path in adapters),
        }
    drawn = draw(cell, adapters, device)
    for kind, pictures in drawn.items():
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{kind}-{number:02}.png")
    for path in adapters:
        path.unlink()
    rows, seen = others_of(cell), judge(drawn["others"])
    line |= {
        "hits": cell.hits(judge(drawn["own"])),
        "pictures": len(drawn["own"]),
        "others": [verdict.subject == row[1] for verdict, row in zip(seen, rows, strict=True)],
        "others_styles": [verdict.style == row[2] for verdict, row in zip(seen, rows, strict=True)],
        "cpu_seconds": round(time.process_time() - start),
    }
    if cell.name != "base":
        plain = files(work / base_of(cell).key.replace("/", "-"), "others")
        line["change"] = round(mean_change([Image.open(path) for path in plain], drawn["others"]), 2)
    return line


def base_of(cell: Cell) -> Cell:
    """Return the cell that draws the same without an adapter."""
    return Cell("base", cell.task, 0, cell.course)


def mean_change(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Return the mean difference of pictures, in 256 levels of a channel."""
    pairs = zip(before, after, strict=True)
    return float(np.mean([np.abs(np.float32(one) - np.float32(other)).mean() for one, other in pairs]))


def cells(full: bool, course: Course) -> list[Cell]:
    """Return the grid, those that tell most first."""
    subjects = [subject.name for subject in HELD_OUT_SUBJECTS]
    names = [name for name, setting in SETTINGS.items() if setting.method in TRAINERS]
    core = [name for name in CORE if name in names]
    first = subjects[0]
    if full:
        tasks = [*subjects, *HELD_OUT_STYLES]
        return [Cell(name, task, seed, course) for seed in range(3) for task in tasks for name in names]
    tasks = ["koala", "teapot", *HELD_OUT_STYLES]
    return [Cell(name, first, 0, course) for name in names] + [
        Cell(name, task, 0, course) for task in tasks for name in core
    ]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the results by cell; the last one of a cell counts."""
    if not path.is_file():
        return {}
    return {line["cell"]: line for line in map(json.loads, path.read_text().splitlines())}


def add(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to the results with what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**line, **machine()}) + "\n")
    print(json.dumps(line), flush=True)


def cost(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return the line of what a step of each method costs on the starter, beside full fine-tuning."""
    providers = {FORWARD: Provider("forward")}
    for name in names:
        providers[name] = Provider("studio", SETTINGS[name].chosen)
    return {"cell": cost_key(names), "rows": measure("starter", providers, rounds, baseline="full")}


def cost_key(names: Sequence[str]) -> str:
    """Return the name of the cell of costs; another choice of methods or options is another cell."""
    facts = json.dumps(
        [[name, SETTINGS[name].method, dict(SETTINGS[name].options)] for name in sorted(names)]
    )
    return f"cost/{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def missing(wanted: Sequence[Cell], done: Mapping[str, object], work: Path) -> Iterator[Cell]:
    """Go through what is left to do, the drawing without adapter before the first that needs it."""
    drawn: set[str] = set()
    for cell in wanted:
        if cell.key in done:
            continue
        plain = base_of(cell)
        here = len(files(work / plain.key.replace("/", "-"), "others")) == cell.course.others
        if plain.key not in drawn and (plain.key not in done or not here):
            yield plain
        drawn.add(plain.key)
        yield cell


def sheet(wanted: Sequence[Cell], work: Path, path: Path, *, columns: int = 6) -> None:
    """Draw a row for each method on the first task: what it learned, then the other prompts."""
    task = wanted[0].task
    tiles: list[Image.Image] = []
    for cell in [base_of(wanted[0]), *(cell for cell in wanted if cell.task == task and cell.seed == 0)]:
        folder = work / cell.key.replace("/", "-")
        own, others = files(folder, "own")[:: cell.course.seeds], files(folder, "others")
        if own and others:
            tiles += [Image.open(one).convert("RGB") for one in (*own[:columns], *others[:columns])]
    grid(tiles, columns=2 * columns).quantize(128).save(path, optimize=True)


def main() -> None:
    """Fill the results, or print the tables that they give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the grid for a GPU")
    parser.add_argument("--table", action="store_true", help="print the tables and do no work")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first task and do no work")
    parser.add_argument("--results", type=Path, default=METHODS)
    parser.add_argument("--work", type=Path, default=Path("out") / "bench_methods", help="for the pictures")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = cells(args.full, Course())
    if args.sheet:
        sheet(wanted, args.work, args.sheet)
        return
    if args.table:
        print(methods_table(list(read(args.results).values())))
    else:
        for cell in missing(wanted, read(args.results), args.work):
            add(args.results, run(cell, args.work, args.device))
        names = list(dict.fromkeys(cell.name for cell in wanted))
        if cost_key(names) not in read(args.results):
            add(args.results, cost(names, rounds=7))


if __name__ == "__main__":
    main()
