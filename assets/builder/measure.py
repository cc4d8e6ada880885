"""Draw with a starter and count what the evaluator recognises, with confidence intervals."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from studio.assets.builder.captions import caption
from studio.assets.builder.evaluator import Verdict, judge
from studio.assets.builder.subjects import SHIPPED, Subject, Vocabulary

HEADS = ("subject", "style", "background")

Row = tuple[str, str, str, str]
"""A prompt with the subject, style and background that it names."""


def wilson(right: int, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95 % for the default ``z``)."""
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def draw(
    pipe: Any,
    prompts: list[str],
    *,
    seed: int,
    steps: int = 25,
    guidance: float = 5.0,
    negative: str | None = None,
    batch: int = 16,
) -> list[Image.Image]:
    """Return one picture per prompt; picture i has the noise of seed + i, whatever the batch size."""
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", mininterval=5):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + row) for row in range(len(part))]
        pictures += pipe(
            part,
            negative_prompt=None if negative is None else [negative] * len(part),
            generator=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images
    return pictures


def labelled_prompts(
    count: int,
    *,
    seed: int,
    vocabulary: Vocabulary = SHIPPED,
    pairs: Sequence[tuple[Subject, str]] = (),
    strangers: tuple[str, ...] = (),
) -> list[Row]:
    """Return captions with the subject, style and background that they name.

    Args:
        count: How many.
        seed: Of their choice.
        vocabulary: What they are about.
        pairs: Subjects and styles to choose from; all that are shown in training where none are given.
        strangers: Words put before some nouns that say nothing about the picture.
    """
    rng = random.Random(seed)
    held = set(vocabulary.held_out_pairs)
    rows: list[Row] = []
    while len(rows) < count:
        if pairs:
            subject, style = rng.choice(pairs)
        else:
            subject, style = rng.choice(vocabulary.subjects), rng.choice(vocabulary.styles)
            if (subject, style) in held:
                continue
        ground = rng.choice(list(vocabulary.backgrounds))
        rows.append((caption(subject, style, ground, rng, strangers=strangers), subject.name, style, ground))
    return rows


def shares(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Return the share of right subjects, styles and backgrounds, each with its 95 % interval."""
    found = {}
    for column, head in enumerate(HEADS, 1):
        right = sum(
            getattr(verdict, head) == row[column] for verdict, row in zip(verdicts, rows, strict=True)
        )
        low, high = wilson(right, len(rows))
        found[head] = {"share": round(right / len(rows), 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def accuracy(pipe: Any, rows: Sequence[Row], *, seed: int, **how: Any) -> dict[str, dict[str, float]]:
    """Draw the prompts and return ``shares`` of the pictures; ``how`` goes to ``draw``."""
    return shares(rows, judge(draw(pipe, [row[0] for row in rows], seed=seed, **how)))


def grid(pictures: list[Image.Image], *, columns: int) -> Image.Image:
    """Return the pictures in rows of ``columns``."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def load(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return the starter, by default in fp32 on the CPU, without bars of its steps."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
