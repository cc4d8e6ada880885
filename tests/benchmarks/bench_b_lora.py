"""Do B-LoRA's two files part content from style? The evaluator counts, beside a plain LoRA of the same size.

    python tests/benchmarks/bench_b_lora.py

One picture of a subject that the base has never seen, in a style that it knows, is rendered and learned
twice: by B-LoRA, and by LoRA on all attention layers with as many parameters. Content is kept if pictures
that ask for another style show the new subject in that style; style is carried if pictures that ask for other
subjects show these in the picture's style. A second call goes on where the first one was stopped. Writes and
prints JSON with machine and versions.

The blocks are by default those that `studio probe` found on the embedded base, an experiment; SDXL's own are
used with --base SDXL_STARTER --content-blocks '' --style-blocks ''.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

import studio
from studio.assets.builder.captions import with_article
from studio.assets.builder.evaluator import judge
from studio.assets.builder.measure import grid, wilson
from studio.assets.builder.render import render
from studio.assets.builder.subjects import BACKGROUNDS, STYLES, SUBJECTS
from studio.block_probe.prompt_pairs import STARTER_WORDS
from studio.trainers.methods.b_lora import BLoraOptions, roles_of
from studio.trainers.targets import target_layers

TOKEN = "[v]"
ROWS = 6
"""Pictures of each task in the grid."""


def size_of(layers: dict[str, Any], rank: int) -> int:
    """Return how many parameters low-rank matrices on these layers have."""
    return rank * sum(sum(layer.weight.shape) for layer in layers.values())


def same_size_rank(pipe: Any, options: BLoraOptions) -> tuple[int, int, int]:
    """Return B-LoRA's number of parameters, the rank at which plain LoRA comes nearest, and its number."""
    blocks = [block for names in roles_of(pipe, options).values() for block in names]
    own, everywhere = (
        target_layers(pipe, targets="attention", exclude=(), text_encoders=False, blocks=within)["unet"]
        for within in (blocks, None)
    )
    wanted, one = size_of(own, options.rank), size_of(everywhere, 1)
    rank = max(1, round(wanted / one))
    return wanted, rank, rank * one


def prompts(args: argparse.Namespace) -> dict[str, list[tuple[str, str, str]]]:
    """Return for each task prompts with the subject and the style that pictures should show."""
    grounds = list(BACKGROUNDS)
    others = [style for style in STYLES if style != args.style]
    known = [subject.name for subject in SUBJECTS]
    tasks: dict[str, list[tuple[str, str, str]]] = {"content": [], "style": []}
    for number in range(args.pictures):
        ground = grounds[number % len(grounds)]
        style = others[number % len(others)]
        opening = STARTER_WORDS.styles[style]
        tasks["content"].append((f"{opening} a {TOKEN} on a {ground} background", args.subject, style))
        subject = known[number % len(known)]
        text = f"{with_article(subject)} in {TOKEN} style on a {ground} background"
        tasks["style"].append((text, subject, args.style))
    return tasks


def train(args: argparse.Namespace, name: str, **values: Any) -> dict[str, Path]:
    """Return the files of a method by part, trained unless they are there."""
    folder = args.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    render(args.subject, args.style, args.background).save(folder / "picture.png")
    path = args.output / f"{name}.safetensors"
    parts = {word: path.with_name(f"{name}-{word}.safetensors") for word in ("content", "style")}
    if not path.is_file():
        given = {"base": args.base, "data": folder, "prompt": f"A {TOKEN}", "output": path, "overwrite": True}
        given |= {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
        given |= {"schedule": "constant", "min_snr_gamma": None, "device": args.device}
        studio.train(studio.TrainSpec.model_validate(given | values))
    return {"whole": path, **{word: part for word, part in parts.items() if part.is_file()}}


def draw(
    args: argparse.Namespace, name: str, rows: list[tuple[str, str, str]], adapters: dict[Path, float]
) -> list[Image.Image]:
    """Return one picture per row, drawn unless all are there."""
    folder = args.output / name
    paths = [folder / f"{number:04d}-{number}.png" for number in range(len(rows))]
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"base": args.base, "adapters": adapters, "steps": args.draw_steps, "device": args.device}
        for number, (text, _, _) in enumerate(rows):
            (drawn,) = studio.generate_batch([text], seeds=[number], **settings)
            drawn.image.save(paths[number])
    return [Image.open(path) for path in paths]


def count(pictures: list[Image.Image], rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Return shares of pictures with the wanted subject, the wanted style, and both with its interval."""
    verdicts = judge(pictures)
    subject = [verdict.subject == row[1] for verdict, row in zip(verdicts, rows, strict=True)]
    style = [verdict.style == row[2] for verdict, row in zip(verdicts, rows, strict=True)]
    both = sum(one and other for one, other in zip(subject, style, strict=True))
    total = len(rows)
    return {
        "subject": round(sum(subject) / total, 3),
        "style": round(sum(style) / total, 3),
        "both": round(both / total, 3),
        "both_95": [round(bound, 3) for bound in wilson(both, total)],
    }


def main() -> None:
    """Train both, draw, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="starter")
    parser.add_argument("--subject", default="unicorn")
    parser.add_argument("--style", default="watercolor", choices=STYLES)
    parser.add_argument("--background", default="white")
    parser.add_argument("--content-blocks", default="up_blocks.3.attentions.0")
    parser.add_argument(
        "--style-blocks", default="down_blocks.0,up_blocks.3.attentions.1,up_blocks.3.attentions.2"
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=24, help="of each task and adapter")
    parser.add_argument("--draw-steps", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("out") / "bench_b_lora")
    args = parser.parse_args()
    blocks = {
        f"{role}_blocks": tuple(part for part in getattr(args, f"{role}_blocks").split(",") if part)
        for role in ("content", "style")
    }
    pipe = studio.load_base(args.base, device="cpu", precision="fp32")
    parameters, plain_rank, plain_parameters = same_size_rank(pipe, BLoraOptions(rank=args.rank, **blocks))
    parted = train(args, "b-lora", method="b-lora", rank=args.rank, **blocks)
    plain = train(args, "lora", method="lora", rank=plain_rank)
    files = {
        "no adapter": {"content": None, "style": None},
        "b-lora, one part": parted,
        "b-lora, whole": {"content": parted["whole"], "style": parted["whole"]},
        "lora": {"content": plain["whole"], "style": plain["whole"]},
    }
    found: dict[str, dict[str, Any]] = {}
    sheet: list[Image.Image] = [Image.open(args.output / "data" / "picture.png")] * ROWS * 2
    for name, by_task in files.items():
        for task, rows in prompts(args).items():
            adapters = {by_task[task]: 1.0} if by_task[task] else {}
            pictures = draw(args, f"{name}-{task}".replace(", ", "-").replace(" ", "-"), rows, adapters)
            found.setdefault(name, {})[task] = count(pictures, rows)
            sheet += pictures[:ROWS]
    facts = {
        "base": args.base,
        "picture": f"{args.subject}, {args.style}",
        "blocks": blocks,
        "parameters": {"b-lora": parameters, "lora": plain_parameters},
        "ranks": {"b-lora": args.rank, "lora": plain_rank},
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "pictures_each": args.pictures,
        "draw_steps": args.draw_steps,
        "shares": found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    big = [picture.convert("RGB").resize((96, 96)) for picture in sheet]
    grid(big, columns=2 * ROWS).save(args.output / "comparison.png", optimize=True)
    (args.output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
