"""Pairs of prompts that differ in one thing: the subject alone, or the style alone."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, permutations
from typing import Literal

from studio.assets.builder.captions import with_article
from studio.assets.builder.subjects import BACKGROUNDS, SUBJECTS

Kind = Literal["content", "style"]
KINDS: tuple[Kind, ...] = ("content", "style")


@dataclass(frozen=True)
class Words:
    """What prompts are made of.

    Attributes:
        subjects: Nouns.
        styles: From a style's name to the words that open a prompt in it.
        endings: What may follow the subject.
    """

    subjects: Sequence[str]
    styles: Mapping[str, str]
    endings: Sequence[str] = ("",)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for."""

    prompt: str
    subject: str
    style: str

    def named(self, kind: Kind) -> str:
        """Return the name of its subject or of its style."""
        return self.subject if kind == "content" else self.style


@dataclass(frozen=True)
class Pair:
    """Two prompts drawn from the same noise.

    Attributes:
        kind: What they differ in: "content" (the subject) or "style".
        own: What most of the UNet reads.
        other: What the probed blocks read.
        seed: Of the noise.
    """

    kind: Kind
    own: Scene
    other: Scene
    seed: int


STARTER_WORDS = Words(
    tuple(subject.name for subject in SUBJECTS),
    {
        "plain": "a photo of",
        "sketch": "a pencil sketch of",
        "pixel": "pixel art of",
        "watercolor": "a watercolor painting of",
        "cartoon": "a cartoon of",
        "gold": "a golden statue of",
    },
    tuple(f" on a {ground} background" for ground in BACKGROUNDS),
)
"""What the embedded bases were taught, under the names by which their evaluator calls it."""

COMMON_WORDS = Words(
    (
        "cat",
        "dog",
        "horse",
        "parrot",
        "elephant",
        "car",
        "bicycle",
        "sailing boat",
        "castle",
        "lighthouse",
        "teapot",
        "guitar",
        "pineapple",
        "cactus",
        "robot",
        "violinist",
    ),
    {
        "photo": "a photo of",
        "oil": "an oil painting of",
        "sketch": "a pencil sketch of",
        "watercolor": "a watercolor painting of",
        "anime": "an anime drawing of",
        "pixel": "pixel art of",
        "clay": "a clay figure of",
        "stained glass": "a stained glass window of",
    },
)
"""What any base trained on pictures of the internet knows."""


def prompt_pairs(count: int, *, words: Words, seed: int) -> list[Pair]:
    """Return ``count`` pairs that differ in the subject, then as many that differ in the style.

    Every ordered pair of subjects, or of styles, comes before any comes twice.
    """
    rng = random.Random(seed)
    pairs: list[Pair] = []
    for kind in KINDS:
        ordered = list(permutations(words.subjects if kind == "content" else words.styles, 2))
        rng.shuffle(ordered)
        for index, (own, other) in enumerate(islice(cycle(ordered), count)):
            subject, style = rng.choice(words.subjects), rng.choice(list(words.styles))
            ending = rng.choice(words.endings)
            if kind == "content":
                one, two = (_scene(words, name, style, ending) for name in (own, other))
            else:
                one, two = (_scene(words, subject, name, ending) for name in (own, other))
            pairs.append(Pair(kind, one, two, seed + index))
    return pairs


def _scene(words: Words, subject: str, style: str, ending: str) -> Scene:
    return Scene(f"{words.styles[style]} {with_article(subject)}{ending}", subject, style)
