"""The subjects, styles and backgrounds that the starters and the evaluator are made of.

Subjects are glyphs of the font Noto Color Emoji (SIL Open Font License 1.1). Held-out entries never appear in
a starter's training data: they are the material for adapters whose success can be measured. The evaluator
knows all of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """One thing to draw.

    Attributes:
        name: English noun used in captions; unique.
        glyph: The emoji character whose sprite is committed under ``assets/sprites/<name>.png``.
        synonyms: Other words for the same thing, used in some captions.
    """

    name: str
    glyph: str
    synonyms: tuple[str, ...] = ()


SUBJECTS: tuple[Subject, ...] = (
    Subject("fox", "\U0001f98a"),
    Subject("cat", "\U0001f431", ("kitten",)),
    Subject("dog", "\U0001f436", ("puppy",)),
    Subject("panda", "\U0001f43c"),
    Subject("frog", "\U0001f438"),
    Subject("penguin", "\U0001f427"),
    Subject("owl", "\U0001f989"),
    Subject("octopus", "\U0001f419"),
    Subject("whale", "\U0001f433"),
    Subject("turtle", "\U0001f422", ("tortoise",)),
    Subject("butterfly", "\U0001f98b"),
    Subject("ladybug", "\U0001f41e", ("beetle",)),
    Subject("tree", "\U0001f333"),
    Subject("cactus", "\U0001f335"),
    Subject("mushroom", "\U0001f344", ("toadstool",)),
    Subject("sunflower", "\U0001f33b"),
    Subject("apple", "\U0001f34e"),
    Subject("strawberry", "\U0001f353"),
    Subject("pizza", "\U0001f355", ("slice of pizza",)),
    Subject("burger", "\U0001f354", ("hamburger",)),
    Subject("car", "\U0001f697", ("automobile",)),
    Subject("rocket", "\U0001f680", ("spaceship",)),
    Subject("house", "\U0001f3e0", ("home",)),
    Subject("guitar", "\U0001f3b8"),
)

HELD_OUT_SUBJECTS: tuple[Subject, ...] = (
    Subject("robot", "\U0001f916"),
    Subject("unicorn", "\U0001f984"),
    Subject("pineapple", "\U0001f34d"),
    Subject("koala", "\U0001f428"),
    Subject("teapot", "\U0001fad6"),
    Subject("crab", "\U0001f980"),
)

STYLES: tuple[str, ...] = ("plain", "sketch", "pixel", "watercolor")
HELD_OUT_STYLES: tuple[str, ...] = ("neon", "mosaic")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "red": (214, 60, 60),
    "blue": (70, 110, 220),
    "green": (70, 165, 80),
    "yellow": (240, 214, 80),
    "gray": (128, 128, 132),
}
HELD_OUT_BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "purple": (140, 80, 180),
    "orange": (240, 145, 50),
}

ALL_SUBJECTS: tuple[Subject, ...] = SUBJECTS + HELD_OUT_SUBJECTS
ALL_STYLES: tuple[str, ...] = STYLES + HELD_OUT_STYLES
ALL_BACKGROUNDS: dict[str, tuple[int, int, int]] = BACKGROUNDS | HELD_OUT_BACKGROUNDS
