"""Measure a starter with the evaluator, and draw the grid of its model card.

python -m studio.assets.builder.measure --prompts 480 --output build/measured
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from tqdm import tqdm

from studio.assets.builder.build import STARTER
from studio.assets.builder.captions import caption
from studio.assets.builder.evaluator import judge
from studio.assets.builder.subjects import BACKGROUNDS, STYLES, SUBJECTS


def wilson(right: int, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95 % for the default ``z``)."""
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def draw(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    *,
    seed: int,
    steps: int = 25,
    guidance: float = 5.0,
    batch: int = 16,
) -> list[Image.Image]:
    """Return one picture per prompt; picture i has the noise of seed + i, whatever the batch size."""
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", mininterval=5):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + row) for row in range(len(part))]
        pictures += pipe(part, generator=noise, num_inference_steps=steps, guidance_scale=guidance).images
    return pictures


def labelled_prompts(count: int, *, seed: int) -> list[tuple[str, str, str, str]]:
    """Return captions with the subject, style and background that they name."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        subject, style, ground = rng.choice(SUBJECTS), rng.choice(STYLES), rng.choice(list(BACKGROUNDS))
        rows.append((caption(subject, style, ground, rng), subject.name, style, ground))
    return rows


def grid(pictures: list[Image.Image], *, columns: int) -> Image.Image:
    """Return the pictures in rows of ``columns``."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def load(folder: Path) -> StableDiffusionPipeline:
    """Return the starter in fp32 with its progress bars off."""
    disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Print accuracies with confidence intervals as JSON; write the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starter", type=Path, default=STARTER)
    parser.add_argument("--prompts", type=int, default=480)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--output", type=Path, default=Path("measured"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = load(args.starter)

    rows = labelled_prompts(args.prompts, seed=5)
    start = time.monotonic()
    pictures = draw(pipe, [row[0] for row in rows], seed=1000, steps=args.steps, guidance=args.guidance)
    seconds = round((time.monotonic() - start) / len(rows), 3)
    facts: dict[str, object] = {"prompts": len(rows), "seconds_per_picture": seconds}
    verdicts = judge(pictures)
    for head in ("subject", "style", "background"):
        column = ("subject", "style", "background").index(head) + 1
        right = sum(
            getattr(verdict, head) == row[column] for verdict, row in zip(verdicts, rows, strict=True)
        )
        low, high = wilson(right, len(rows))
        facts[head] = {"share": round(right / len(rows), 4), "low": round(low, 4), "high": round(high, 4)}
    (args.output / "accuracy.json").write_text(json.dumps(facts, indent=2) + "\n")

    grounds = list(BACKGROUNDS)
    openings = {
        "plain": "a photo of",
        "sketch": "a pencil sketch of",
        "pixel": "pixel art of",
        "watercolor": "a watercolor painting of",
    }
    prompts = [
        f"{openings[style]} a {subject.name} on a {grounds[(row + column) % len(grounds)]} background"
        for row, style in enumerate(STYLES)
        for column, subject in enumerate(SUBJECTS)
    ]
    grid(draw(pipe, prompts, seed=7), columns=len(SUBJECTS)).quantize(256).save(
        args.output / "grid.png", optimize=True
    )
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
