"""Rendered pictures with captions as tensors, made in worker processes and reproducible from a seed."""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from studio.assets.builder.captions import caption
from studio.assets.builder.render import random_placement, render
from studio.assets.builder.subjects import (
    ALL_BACKGROUNDS,
    ALL_STYLES,
    ALL_SUBJECTS,
    BACKGROUNDS,
    STYLES,
    SUBJECTS,
)

_CHUNK = 512


@dataclass(frozen=True)
class Renders:
    """A set of rendered pictures.

    Attributes:
        pixels: ``[N, 3, size, size]`` uint8.
        labels: ``[N, 3]`` int64: indices into ``ALL_SUBJECTS``, ``ALL_STYLES`` and ``ALL_BACKGROUNDS``.
        captions: N wordings; empty strings where held-out things are shown.
    """

    pixels: Tensor
    labels: Tensor
    captions: list[str]


def _render_chunk(
    job: tuple[int, int, int, bool, tuple[str, ...]],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    seed, count, size, held_out, strangers = job
    rng = random.Random(seed)
    subjects = ALL_SUBJECTS if held_out else SUBJECTS
    styles = ALL_STYLES if held_out else STYLES
    backgrounds = list(ALL_BACKGROUNDS if held_out else BACKGROUNDS)
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty((count, 3), dtype=np.int64)
    words = []
    for row in range(count):
        subject, style, ground = rng.choice(subjects), rng.choice(styles), rng.choice(backgrounds)
        pixels[row] = np.asarray(
            render(subject.name, style, ground, placement=random_placement(rng), size=size)
        )
        labels[row] = (
            ALL_SUBJECTS.index(subject),
            ALL_STYLES.index(style),
            list(ALL_BACKGROUNDS).index(ground),
        )
        words.append("" if held_out else caption(subject, style, ground, rng, strangers=strangers))
    return pixels, labels, words


def render_many(
    count: int,
    *,
    seed: int,
    size: int = 64,
    held_out: bool = False,
    strangers: tuple[str, ...] = (),
    workers: int = 2,
) -> Renders:
    """Render ``count`` random pictures.

    Args:
        count: How many.
        seed: Same seed and count: the same pictures, whatever the number of workers.
        size: Side in pixels.
        held_out: Draw from the held-out subjects, styles and backgrounds too (the evaluator); no captions
            then.
        strangers: See ``caption``.
        workers: Processes.
    """
    jobs = [
        (seed * 1_000_003 + start, min(_CHUNK, count - start), size, held_out, strangers)
        for start in range(0, count, _CHUNK)
    ]
    with ProcessPoolExecutor(workers) as pool:
        chunks = list(pool.map(_render_chunk, jobs))
    pixels = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks])).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(np.concatenate([chunk[1] for chunk in chunks]))
    return Renders(pixels, labels, [text for chunk in chunks for text in chunk[2]])
