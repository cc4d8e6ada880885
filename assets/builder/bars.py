"""Measure all that a starter's model card claims, in one run.

python -m studio.assets.builder.bars starter --prompts 500 --output build/measured/starter

Writes ``bars.json`` and the pictures of the card. A run that was cut short goes on from the parts that
``bars.json`` holds.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from studio.assets.builder.autoencoder import psnr, reconstruct, reconstruction_psnr, to_unit
from studio.assets.builder.build import ASSETS, machine_name
from studio.assets.builder.captions import opening, with_article
from studio.assets.builder.dataset import render_many
from studio.assets.builder.evaluator import judge
from studio.assets.builder.measure import Row, accuracy, draw, grid, labelled_prompts, load, shares
from studio.assets.builder.recipe import RECIPES, Recipe
from studio.assets.builder.subjects import Subject
from studio.assets.builder.tokenizer import stranger_words
from studio.assets.builder.training import Machine
from studio.models.schedulers import make_scheduler

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
STEPS = (8, 12, 25, 50)
SOLVERS = ("ddim", "euler", "euler-ancestral", "dpm++2m", "heun", "pndm", "unipc")
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
RENDERS = 256  # through the autoencoder
_SEED = 1000
_PHOTOGRAPHS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        recipe: What the starter was built from.
        folder: The starter.
        device: "cpu" or "cuda".
        prompts: Prompts of the two main counts.
        sweep: Prompts of each setting of guidance, steps, solver and wording.
        photographs: Folder of photographs for the autoencoder.
        output: Folder of the results.
    """

    recipe: Recipe
    folder: Path
    device: str
    prompts: int
    sweep: int
    photographs: Path | None
    output: Path

    def rows(self, count: int, **choice: Any) -> list[Row]:
        """Return prompts with what they name."""
        return labelled_prompts(count, seed=5, vocabulary=self.recipe.vocabulary, **choice)


def measure_prompts(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Count what is right at default settings, for pairs shown in training and for pairs kept from it."""
    found = {"shown": accuracy(pipe, bench.rows(bench.prompts), seed=_SEED)}
    pairs = bench.recipe.vocabulary.held_out_pairs
    if pairs:
        found["held-out pairs"] = accuracy(pipe, bench.rows(bench.prompts, pairs=pairs), seed=_SEED)
    return found


def measure_settings(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Count what is right at other guidance, numbers of steps and solvers, and with a negative prompt."""
    count = partial(accuracy, pipe, bench.rows(bench.sweep), seed=_SEED)
    found = {f"guidance {scale:g}": count(guidance=scale) for scale in GUIDANCE}
    found |= {f"{steps} steps": count(steps=steps) for steps in STEPS}
    found["negative prompt"] = count(negative="blurry, ugly, two of them")
    own = pipe.scheduler
    for solver in SOLVERS:
        pipe.scheduler = make_scheduler(pipe, solver)
        found[solver] = count()
        pipe.scheduler = own
    return found


def measure_wordings(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Count what is right for synonyms, for another order of words, for tags and with unknown words."""
    words = bench.recipe.vocabulary
    strangers = stranger_words(bench.sweep, words)
    known = [(subject, style) for subject, style in words.shown_pairs if subject.synonyms]
    rows = bench.rows(bench.sweep)
    thing = {subject.name: subject for subject in words.subjects}

    def reword(form: Callable[[Subject, str, str, int], str], rows: list[Row]) -> list[Row]:
        return [(form(thing[s], t, b, row), s, t, b) for row, (_, s, t, b) in enumerate(rows)]

    forms: dict[str, list[Row]] = {
        "synonyms": reword(
            lambda s, t, b, _: f"{opening(t)} {with_article(s.synonyms[0])} on a {b} background",
            bench.rows(bench.sweep, pairs=known),
        ),
        "background first": reword(
            lambda s, t, b, _: f"{b} background, {opening(t)} {with_article(s.name)}", rows
        ),
        "tags": reword(lambda s, t, b, _: f"{s.name}, {opening(t).split(' of')[0]}, {b} background", rows),
        "unknown word": reword(
            lambda s, t, b, row: f"{opening(t)} a {strangers[row]} {s.name} on a {b} background", rows
        ),
    }
    return {name: accuracy(pipe, each, seed=_SEED) for name, each in forms.items()}


def measure_precisions(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Draw the same pictures in 16 bits: dB between them and fp32's, and what is right."""
    rows = bench.rows(min(32, bench.sweep))
    prompts = [row[0] for row in rows]
    wanted = draw(pipe, prompts, seed=_SEED)
    found: dict[str, Any] = {"fp32": shares(rows, judge(wanted))}
    for name, dtype in PRECISIONS.items():
        pictures = draw(load(bench.folder, device=bench.device, dtype=dtype), prompts, seed=_SEED)
        alike = [psnr(_unit(one), _unit(two)) for one, two in zip(pictures, wanted, strict=True)]
        found[name] = shares(rows, judge(pictures)) | {
            "median dB to fp32": round(statistics.median(alike), 1)
        }
    return found


def measure_seconds(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Return the seconds of one guided picture of 25 steps on two CPU cores, the least of three."""
    pipe = load(bench.folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seconds = []
    for run in range(4):
        start = time.perf_counter()
        draw(pipe, [bench.rows(1)[0][0]], seed=run)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {"seconds": round(min(seconds[1:]), 2), "cores": os.cpu_count()}


def measure_autoencoder(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Return the dB of renders and of photographs through the autoencoder; write a picture of the latter."""
    size = bench.recipe.size
    fresh = render_many(RENDERS, seed=4, size=size, vocabulary=bench.recipe.vocabulary, workers=1).pixels
    found: dict[str, Any] = {"renders": round(reconstruction_psnr(pipe.vae, fresh), 2)}
    if bench.photographs is None:
        return found
    files = sorted(path for path in bench.photographs.rglob("*") if path.suffix in _PHOTOGRAPHS)
    if not files:
        raise SystemExit(f"{bench.photographs} holds no .jpg, .jpeg or .png. Name a folder of photographs.")
    pixels = torch.stack([_square(Image.open(path), size) for path in files])
    through = reconstruct(pipe.vae, pixels)
    both = [to_unit(pixels)[:12], through[:12].clamp(-1, 1)]
    rows = [_picture(each) for part in both for each in part]
    sheet = grid(rows, columns=min(12, len(files))).quantize(256)
    sheet.save(bench.output / "photographs.png", optimize=True)
    return found | {"photographs": round(psnr(through, to_unit(pixels)), 2), "count": len(files)}


def draw_grids(bench: Bench, pipe: Any) -> dict[str, Any]:
    """Write the card's pictures: subjects by styles, guidance, and pairs never shown."""
    words = bench.recipe.vocabulary
    subjects = words.subjects[:: max(1, len(words.subjects) // 16)][:16]
    grounds = list(words.backgrounds)

    def prompt(subject: Subject, style: str, number: int) -> str:
        ground = grounds[number % len(grounds)]
        return f"{opening(style)} {with_article(subject.name)} on a {ground} background"

    def write(name: str, pictures: list[Image.Image], columns: int) -> None:
        small = [picture.resize((64, 64), Image.Resampling.LANCZOS) for picture in pictures]
        grid(small, columns=columns).quantize(256).save(bench.output / name, optimize=True)

    table = [
        prompt(subject, style, row + column)
        for row, style in enumerate(words.styles)
        for column, subject in enumerate(subjects)
    ]
    write("grid.png", draw(pipe, table, seed=7), len(subjects))
    line = [prompt(subject, words.styles[at % len(words.styles)], at) for at, subject in enumerate(subjects)]
    swept = [picture for scale in GUIDANCE for picture in draw(pipe, line, seed=7, guidance=scale)]
    write("guidance.png", swept, len(subjects))
    pairs = [prompt(*pair, at) for at, pair in enumerate(words.held_out_pairs[:32])]
    if pairs:
        write("pairs.png", draw(pipe, pairs, seed=7), min(16, len(pairs)))
    return {"files": sorted(path.name for path in bench.output.glob("*.png"))}


PARTS: dict[str, Callable[[Bench, Any], dict[str, Any]]] = {
    "prompts": measure_prompts,
    "autoencoder": measure_autoencoder,
    "seconds": measure_seconds,
    "precisions": measure_precisions,
    "wordings": measure_wordings,
    "settings": measure_settings,
    "grids": draw_grids,
}


def measure_all(bench: Bench, *, deadline: float = math.inf) -> dict[str, Any]:
    """Measure every part that ``bars.json`` lacks, until ``time.monotonic()`` says that it is late.

    Returns:
        What ``bars.json`` holds: a result under every name of ``PARTS`` when all is measured.
    """
    bench.output.mkdir(parents=True, exist_ok=True)
    path = bench.output / "bars.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    pipe = load(bench.folder, device=bench.device)
    for name, part in PARTS.items():
        if name not in facts and time.monotonic() < deadline:
            facts[name] = part(bench, pipe)
            facts |= {
                "count": bench.prompts,
                "sweep": bench.sweep,
                "machine": machine_name(Machine(bench.device)),
            }
            path.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _unit(picture: Image.Image) -> torch.Tensor:
    return to_unit(torch.from_numpy(np.array(picture)))


def _square(picture: Image.Image, size: int) -> torch.Tensor:
    """Return the middle of a photograph ``[3, size, size]`` uint8."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    part = picture.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(part.resize((size, size), Image.Resampling.LANCZOS))).permute(2, 0, 1)


def _picture(unit: torch.Tensor) -> Image.Image:
    return Image.fromarray(((unit.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def main() -> None:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--starter", type=Path, help="diffusers folder (default: assets/RECIPE)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--sweep", type=int, default=96, help="prompts of each other setting")
    parser.add_argument("--photographs", type=Path, help="folder of photographs for the autoencoder")
    parser.add_argument("--output", type=Path, help="default: build/measured/RECIPE")
    args = parser.parse_args()
    bench = Bench(
        RECIPES[args.recipe],
        args.starter or ASSETS / args.recipe,
        args.device,
        args.prompts,
        args.sweep,
        args.photographs,
        args.output or Path("build/measured") / args.recipe,
    )
    print(json.dumps(measure_all(bench), indent=2))


if __name__ == "__main__":
    main()
