"""Do B-LoRA's two files part content from style? The evaluator counts, beside a plain LoRA of the same size.

    python tests/benchmarks/bench_b_lora.py

Pictures of subjects that the base has never seen, in styles that it knows, are rendered, and each is learned
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Shown(NamedTuple):
    """What a picture shows."""

    subject: str
    style: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.subject}-{self.style}"

    @classmethod
    def read(cls, text: str) -> "Shown":
        """Return what "subject:style" says."""
        subject, _, style = text.partition(":")
        if style not in STYLES:
            raise argparse.ArgumentTypeError(f"{text!r} is no subject:style with one of {', '.join(STYLES)}")
        return cls(subject, style)


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


def prompts(args: argparse.Namespace, picture: Shown) -> dict[str, list[tuple[str, str, str]]]:
    """Return for each task prompts with the subject and the style that pictures should show."""
    grounds = list(BACKGROUNDS)
    others = [style for style in STYLES if style != picture.style]
    known = [subject.name for subject in SUBJECTS]
    tasks: dict[str, list[tuple[str, str, str]]] = {"content": [], "style": []}
    for number in range(args.pictures):
        ground = grounds[number % len(grounds)]
        style = others[number % len(others)]
        opening = STARTER_WORDS.styles[style]
        tasks["content"].append((f"{opening} a {TOKEN} on a {ground} background", picture.subject, style))
        subject = known[number % len(known)]
        text = f"{with_article(subject)} in {TOKEN} style on a {ground} background"
        tasks["style"].append((text, subject, picture.style))
    return tasks


def train(args: argparse.Namespace, picture: Shown, name: str, **values: Any) -> dict[str, Path]:
    """Return the files of a method by part, trained unless they are there."""
    folder = args.output / picture.name / "data"
    folder.mkdir(parents=True, exist_ok=True)
    render(picture.subject, picture.style, args.background).save(folder / "picture.png")
    path = args.output / picture.name / f"{name}.safetensors"
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


@dataclass
class Counts:
    """Pictures with the wanted subject, with the wanted style, with both, and all."""

    subject: int = 0
    style: int = 0
    both: int = 0
    total: int = 0

    def add(self, pictures: list[Image.Image], rows: list[tuple[str, str, str]]) -> None:
        """Count pictures of prompts."""
        for verdict, (_, subject, style) in zip(judge(pictures), rows, strict=True):
            right = verdict.subject == subject, verdict.style == style
            self.subject += right[0]
            self.style += right[1]
            self.both += all(right)
            self.total += 1

    def shares(self) -> dict[str, Any]:
        """Return the shares, of both with its 95 % interval."""
        return {
            "subject": round(self.subject / self.total, 3),
            "style": round(self.style / self.total, 3),
            "both": round(self.both / self.total, 3),
            "both_95": [round(bound, 3) for bound in wilson(self.both, self.total)],
        }


def compare(
    args: argparse.Namespace, blocks: dict[str, tuple[str, ...]], plain_rank: int
) -> tuple[dict[str, dict[str, Any]], list[Image.Image]]:
    """Return the shares by adapter and task, and rows of pictures: those learned, then those drawn."""
    found: dict[str, dict[str, Counts]] = {}
    sheet: list[Image.Image] = []
    for picture in args.learn:
        parted = train(args, picture, "b-lora", method="b-lora", rank=args.rank, **blocks)
        plain = train(args, picture, "lora", method="lora", rank=plain_rank)
        files = {
            "no adapter": {"content": None, "style": None},
            "b-lora, one part": parted,
            "b-lora, whole": {"content": parted["whole"], "style": parted["whole"]},
            "lora": {"content": plain["whole"], "style": plain["whole"]},
        }
        sheet += [Image.open(args.output / picture.name / "data" / "picture.png")] * ROWS * 2
        for name, by_task in files.items():
            for task, rows in prompts(args, picture).items():
                adapters = {by_task[task]: 1.0} if by_task[task] else {}
                folder = f"{picture.name}/{name}-{task}".replace(", ", "-").replace(" ", "-")
                pictures = draw(args, folder, rows, adapters)
                found.setdefault(name, {}).setdefault(task, Counts()).add(pictures, rows)
                sheet += pictures[:ROWS]
    shares = {
        name: {task: counts.shares() for task, counts in tasks.items()} for name, tasks in found.items()
    }
    return shares, sheet


def main() -> None:
    """Train both, draw, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="starter")
    parser.add_argument(
        "--learn",
        type=Shown.read,
        nargs="+",
        default=[Shown("unicorn", "watercolor")],
        metavar="SUBJECT:STYLE",
        help="pictures, each learned by itself",
    )
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
    shares, sheet = compare(args, blocks, plain_rank)
    facts = {
        "base": args.base,
        "pictures": [f"{picture.subject}, {picture.style}" for picture in args.learn],
        "blocks": blocks,
        "parameters": {"b-lora": parameters, "lora": plain_parameters},
        "ranks": {"b-lora": args.rank, "lora": plain_rank},
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "drawn_each": args.pictures,
        "draw_steps": args.draw_steps,
        "shares": shares,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    big = [picture.convert("RGB").resize((96, 96)) for picture in sheet]
    grid(big, columns=2 * ROWS).save(args.output / "comparison.png", optimize=True)
    (args.output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
