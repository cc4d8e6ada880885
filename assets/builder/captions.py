"""Word a picture: many captions for the same subject, style and background."""

import random

from studio.assets.builder.subjects import Subject

_OPENINGS = {
    "plain": ("a photo of", "a picture of", "an image of", "a drawing of", ""),
    "sketch": ("a pencil sketch of", "a sketch of", "a line drawing of", "a sketched picture of"),
    "pixel": ("pixel art of", "a pixel art picture of", "a pixelated image of", "an 8-bit picture of"),
    "watercolor": (
        "a watercolor painting of",
        "a watercolor of",
        "a watercolour painting of",
        "a soft watercolor picture of",
    ),
    "cartoon": ("a cartoon of", "a comic drawing of", "a cartoon picture of", "a comic of"),
    "gold": ("a golden statue of", "a gold statue of", "a golden figure of", "a gold figurine of"),
}
_SUFFIXES = {
    "sketch": ("pencil sketch", "in sketch style", "sketch"),
    "pixel": ("pixel art", "in pixel art style", "pixelated"),
    "watercolor": ("watercolor", "in watercolor style", "watercolour painting"),
    "cartoon": ("cartoon", "in cartoon style", "comic drawing"),
    "gold": ("golden statue", "in gold", "made of gold"),
}
# Words without meaning for the picture: the text encoder learns to look past what it does not know.
_FILLERS = (
    "nice",
    "beautiful",
    "small",
    "little",
    "big",
    "cute",
    "detailed",
    "simple",
    "lovely",
    "single",
    "old",
    "new",
)


def with_article(noun: str) -> str:
    """Return the noun after its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def opening(style: str) -> str:
    """Return the words that first come to mind for a trained style: ``a pencil sketch of``."""
    return _OPENINGS[style][0]


def _noun(subject: Subject, rng: random.Random, strangers: tuple[str, ...]) -> str:
    noun = rng.choice((subject.name, *subject.synonyms)) if rng.random() < 0.3 else subject.name
    roll = rng.random()
    if roll < 0.12:
        noun = f"{rng.choice(_FILLERS)} {noun}"
    elif roll < 0.24 and strangers:
        noun = f"{rng.choice(strangers)} {noun}"
    return noun if rng.random() < 0.15 else with_article(noun)


def caption(
    subject: Subject, style: str, background: str, rng: random.Random, *, strangers: tuple[str, ...] = ()
) -> str:
    """Return one wording of the picture's contents.

    Args:
        subject: The thing in the picture.
        style: A trained style; a plain picture may go without a style word.
        background: Colour word.
        rng: Source of the choice of words.
        strangers: Words put before some nouns that say nothing about the picture (trigger-like).
    """
    noun = _noun(subject, rng, strangers)
    ground = rng.choice(
        (f"on a {background} background", f"on {background}", f"with a {background} background")
    )
    form = rng.random()
    if style == "plain" or form < 0.6:
        text = f"{rng.choice(_OPENINGS[style])} {noun}"
        return (f"{background} background, {text}" if rng.random() < 0.12 else f"{text} {ground}").strip()
    suffix = rng.choice(_SUFFIXES[style])
    if form < 0.8:
        return f"{noun} {ground}, {suffix}"
    return f"{suffix}, {noun} {ground}" if not suffix.startswith("in ") else f"{noun} {suffix} {ground}"
