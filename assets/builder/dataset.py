"""Rendered pictures as tensors, made in worker processes and reproducible from a seed."""

import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studio.assets.builder.render import Placement, random_placement, render
from studio.assets.builder.subjects import SHIPPED, VOCABULARIES, Vocabulary
from studio.assets.builder.textures import texture

_CHUNK = 512
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Renders:
    """A set of rendered pictures.

    Attributes:
        pixels: ``[N, 3, size, size]`` uint8.
        labels: ``[N, 3]`` int64: indices into the vocabulary's ``all_subjects``, ``all_styles`` and
            ``all_backgrounds``.
        time_ids: ``[N, 6]`` int64, SDXL's: height and width before scaling, top and left of the crop, height
            and width of the picture.
    """

    pixels: Tensor
    labels: Tensor
    time_ids: Tensor


@dataclass(frozen=True)
class _Job:
    seed: int
    count: int
    size: int
    vocabulary: str
    held_out: bool
    framed: bool
    cells: int | None


def frame(
    draw: Callable[[int], Image.Image], rng: random.Random, *, size: int, cells: int | None = None
) -> tuple[Image.Image, tuple[int, ...]]:
    """Return a picture and the SDXL time ids that are true of it.

    Most pictures are whole and sharp, however large they are said to have been; some were smaller, so they
    are soft; some are the right of a wide picture or the bottom of a tall one.

    Args:
        draw: Renders the same picture at any size, with background in its corners.
        rng: Source of the choice.
        size: Side of the picture in pixels.
        cells: Cut whole cells of a grid of so many to a side; see ``random_placement``.

    SDXL, arXiv:2307.01952, Sec. 2.2.
    """
    roll = rng.random()
    if roll < 0.1:
        small = round(size * rng.choice((0.5, 0.75)))
        return draw(small).resize((size, size), Image.Resampling.BICUBIC), (small, small, 0, 0, size, size)
    if roll < 0.25:
        grid = cells or size
        cut = rng.randint(1, grid // 4) * size // grid
        top, left = (cut, 0) if rng.random() < 0.5 else (0, cut)
        whole = draw(size)
        picture = Image.new("RGB", whole.size, whole.getpixel((0, 0)))
        picture.paste(whole, (-left, -top))
        return picture, (size + top, size + left, top, left, size, size)
    height, width = (rng.randrange(size, 8 * size) if roll < 0.5 else size for _ in range(2))
    return draw(size), (height, width, 0, 0, size, size)


def _draw(subject: str, style: str, background: str, placement: Placement, size: int) -> Image.Image:
    return render(subject, style, background, placement=placement, size=size)


def _render_chunk(job: _Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = random.Random(job.seed)
    words = VOCABULARIES[job.vocabulary]
    subjects, styles, grounds = words.all_subjects, words.all_styles, list(words.all_backgrounds)
    shown = words.shown_pairs
    pixels = np.empty((job.count, job.size, job.size, 3), dtype=np.uint8)
    labels = np.empty((job.count, 3), dtype=np.int64)
    time_ids = np.empty((job.count, 6), dtype=np.int64)
    for row in range(job.count):
        if job.held_out:
            subject, style, ground = rng.choice(subjects), rng.choice(styles), rng.choice(grounds)
        else:
            (subject, style), ground = rng.choice(shown), rng.choice(list(words.backgrounds))
        draw = partial(_draw, subject.name, style, ground, random_placement(rng, cells=job.cells))
        if job.framed:
            picture, time_ids[row] = frame(draw, rng, size=job.size, cells=job.cells)
        else:
            picture, time_ids[row] = draw(job.size), (job.size, job.size, 0, 0, job.size, job.size)
        pixels[row] = np.asarray(picture)
        labels[row] = subjects.index(subject), styles.index(style), grounds.index(ground)
    return pixels, labels, time_ids


def _in_processes(work: Callable[..., _Made], jobs: list[_Job], workers: int) -> list[_Made]:
    if workers == 1:
        return [work(job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(work, jobs))


def _jobs(count: int, job: _Job) -> list[_Job]:
    return [
        replace(job, seed=job.seed * 1_000_003 + start, count=min(_CHUNK, count - start))
        for start in range(0, count, _CHUNK)
    ]


def _pixels(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()


def render_many(
    count: int,
    *,
    seed: int,
    size: int = 128,
    vocabulary: Vocabulary = SHIPPED,
    held_out: bool = False,
    framed: bool = False,
    cells: int | None = None,
    workers: int = 2,
) -> Renders:
    """Render ``count`` random pictures.

    Args:
        count: How many.
        seed: Same seed and count: the same pictures, whatever the number of workers.
        size: Side in pixels.
        vocabulary: What is drawn.
        held_out: Draw from the held-out subjects, styles, backgrounds and pairs too (the evaluator).
        framed: Make some pictures soft and cut some, and say so in their time ids; see ``frame``.
        cells: Align subjects to a grid of so many cells to a side; see ``random_placement``.
        workers: Processes; 1 renders in this one.
    """
    jobs = _jobs(count, _Job(seed, count, size, vocabulary.name, held_out, framed, cells))
    pixels, labels, time_ids = zip(*_in_processes(_render_chunk, jobs, workers), strict=True)
    return Renders(
        _pixels(list(pixels)),
        torch.from_numpy(np.concatenate(labels)),
        torch.from_numpy(np.concatenate(time_ids)),
    )


def _texture_chunk(job: _Job) -> np.ndarray:
    rng = np.random.default_rng(job.seed)
    return np.stack([np.asarray(texture(rng, size=job.size)) for _ in range(job.count)])


def texture_many(count: int, *, seed: int, size: int, workers: int = 2) -> Tensor:
    """Return ``[count, 3, size, size]`` uint8 textures, the same for one seed and count."""
    jobs = _jobs(count, _Job(seed, count, size, SHIPPED.name, False, False, None))
    return _pixels(_in_processes(_texture_chunk, jobs, workers))
