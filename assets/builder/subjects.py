"""The subjects, styles and backgrounds that the starters and the evaluator are made of.

Subjects are glyphs of the font Noto Color Emoji (SIL Open Font License 1.1). Held-out entries never appear in
a starter's training data: they are the material for adapters whose success can be measured. The evaluator
knows all of them.
"""

from dataclasses import dataclass, field

Colour = tuple[int, int, int]


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


@dataclass(frozen=True)
class Vocabulary:
    """What one starter is taught and what is kept from it.

    Attributes:
        name: Key in ``VOCABULARIES``.
        subjects: Trained subjects.
        styles: Trained styles.
        backgrounds: Trained background colours by their word.
        held_out_subjects: Subjects that only the evaluator knows.
        held_out_styles: Styles that only the evaluator knows.
        held_out_backgrounds: Background colours that only the evaluator knows.
        pairs_apart: Every so many-th pair of subject and style is never shown together, so that composition
            can be measured; a plain picture of every subject is shown. None are held out at 0.
    """

    name: str
    subjects: tuple[Subject, ...]
    styles: tuple[str, ...]
    backgrounds: dict[str, Colour] = field(hash=False)
    held_out_subjects: tuple[Subject, ...]
    held_out_styles: tuple[str, ...]
    held_out_backgrounds: dict[str, Colour] = field(hash=False)
    pairs_apart: int = 0

    @property
    def all_subjects(self) -> tuple[Subject, ...]:
        """Trained subjects, then held-out ones: the order of the evaluator's answers."""
        return self.subjects + self.held_out_subjects

    @property
    def all_styles(self) -> tuple[str, ...]:
        """Trained styles, then held-out ones."""
        return self.styles + self.held_out_styles

    @property
    def all_backgrounds(self) -> dict[str, Colour]:
        """Trained backgrounds, then held-out ones."""
        return self.backgrounds | self.held_out_backgrounds

    @property
    def held_out_pairs(self) -> tuple[tuple[Subject, str], ...]:
        """Pairs of a trained subject and a trained style that are never shown together."""
        if not self.pairs_apart:
            return ()
        return tuple(
            (subject, style)
            for row, subject in enumerate(self.subjects)
            for column, style in enumerate(self.styles)
            if column and (row + 5 * column) % self.pairs_apart == 0
        )

    @property
    def shown_pairs(self) -> tuple[tuple[Subject, str], ...]:
        """Pairs of subject and style that a starter learns from."""
        held = set(self.held_out_pairs)
        return tuple(
            (subject, style)
            for subject in self.subjects
            for style in self.styles
            if (subject, style) not in held
        )


_FIRST_SUBJECTS = (
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
_FIRST_HELD_OUT = (
    Subject("robot", "\U0001f916"),
    Subject("unicorn", "\U0001f984"),
    Subject("pineapple", "\U0001f34d"),
    Subject("koala", "\U0001f428"),
    Subject("teapot", "\U0001fad6"),
    Subject("crab", "\U0001f980"),
)
_FIRST_BACKGROUNDS = {
    "white": (245, 245, 245),
    "red": (214, 60, 60),
    "blue": (70, 110, 220),
    "green": (70, 165, 80),
    "yellow": (240, 214, 80),
    "gray": (128, 128, 132),
}
_HELD_OUT_BACKGROUNDS = {
    "purple": (140, 80, 180),
    "orange": (240, 145, 50),
}
_MORE_SUBJECTS = (
    Subject("lion", "\U0001f981"),
    Subject("tiger", "\U0001f42f"),
    Subject("rabbit", "\U0001f430", ("bunny",)),
    Subject("pig", "\U0001f437", ("piglet",)),
    Subject("cow", "\U0001f42e"),
    Subject("monkey", "\U0001f435"),
    Subject("chick", "\U0001f425"),
    Subject("duck", "\U0001f986"),
    Subject("parrot", "\U0001f99c"),
    Subject("bee", "\U0001f41d", ("honeybee",)),
    Subject("snail", "\U0001f40c"),
    Subject("fish", "\U0001f420"),
    Subject("shark", "\U0001f988"),
    Subject("dolphin", "\U0001f42c"),
    Subject("elephant", "\U0001f418"),
    Subject("giraffe", "\U0001f992"),
    Subject("zebra", "\U0001f993"),
    Subject("camel", "\U0001f42b"),
    Subject("snake", "\U0001f40d", ("serpent",)),
    Subject("dragon", "\U0001f409"),
    Subject("squirrel", "\U0001f43f"),
    Subject("tulip", "\U0001f337"),
    Subject("rose", "\U0001f339"),
    Subject("banana", "\U0001f34c"),
    Subject("cherry", "\U0001f352", ("cherries",)),
    Subject("grapes", "\U0001f347"),
    Subject("watermelon", "\U0001f349"),
    Subject("carrot", "\U0001f955"),
    Subject("corn", "\U0001f33d"),
    Subject("eggplant", "\U0001f346", ("aubergine",)),
    Subject("avocado", "\U0001f951"),
    Subject("broccoli", "\U0001f966"),
    Subject("donut", "\U0001f369", ("doughnut",)),
    Subject("cake", "\U0001f370"),
    Subject("cookie", "\U0001f36a", ("biscuit",)),
    Subject("pretzel", "\U0001f968"),
    Subject("cheese", "\U0001f9c0"),
    Subject("bicycle", "\U0001f6b2", ("bike",)),
    Subject("bus", "\U0001f68c"),
    Subject("train", "\U0001f682", ("locomotive",)),
    Subject("airplane", "\U0001f6e9", ("plane",)),
    Subject("sailboat", "\u26f5"),
    Subject("anchor", "\u2693"),
    Subject("balloon", "\U0001f388"),
    Subject("umbrella", "\u2614"),
    Subject("clock", "\u23f0"),
    Subject("key", "\U0001f511"),
    Subject("hammer", "\U0001f528"),
    Subject("bulb", "\U0001f4a1", ("lightbulb",)),
    Subject("camera", "\U0001f4f7"),
    Subject("crown", "\U0001f451"),
    Subject("hat", "\U0001f3a9"),
    Subject("gift", "\U0001f381", ("present",)),
    Subject("drum", "\U0001f941"),
    Subject("trumpet", "\U0001f3ba"),
    Subject("violin", "\U0001f3bb", ("fiddle",)),
    Subject("ball", "\u26bd", ("football",)),
    Subject("castle", "\U0001f3f0"),
    Subject("tent", "\u26fa"),
    Subject("bell", "\U0001f514"),
    Subject("moon", "\U0001f319"),
    Subject("pumpkin", "\U0001f383"),
    Subject("ghost", "\U0001f47b"),
    Subject("backpack", "\U0001f392", ("rucksack",)),
)
_MORE_HELD_OUT = (
    Subject("flamingo", "\U0001f9a9"),
    Subject("dinosaur", "\U0001f995"),
    Subject("cupcake", "\U0001f9c1"),
    Subject("tractor", "\U0001f69c"),
    Subject("snowman", "\u26c4"),
    Subject("trophy", "\U0001f3c6"),
    Subject("helicopter", "\U0001f681"),
    Subject("hedgehog", "\U0001f994"),
)

DRAFT = Vocabulary(
    "draft",
    _FIRST_SUBJECTS,
    ("plain", "sketch", "pixel", "watercolor"),
    _FIRST_BACKGROUNDS,
    _FIRST_HELD_OUT,
    ("neon", "mosaic"),
    _HELD_OUT_BACKGROUNDS,
)
"""What the first, small starter was taught."""

FULL = Vocabulary(
    "full",
    _FIRST_SUBJECTS + _MORE_SUBJECTS,
    (*DRAFT.styles, "cartoon", "gold"),
    _FIRST_BACKGROUNDS | {"pink": (244, 160, 190), "teal": (30, 150, 155)},
    _FIRST_HELD_OUT + _MORE_HELD_OUT,
    (*DRAFT.held_out_styles, "glass"),
    _HELD_OUT_BACKGROUNDS,
    pairs_apart=13,
)
"""What the full starters are taught. It holds all of ``DRAFT``."""

VOCABULARIES = {each.name: each for each in (DRAFT, FULL)}

SHIPPED = FULL
"""The vocabulary of the starter and the evaluator that are in ``assets`` now."""

SUBJECTS = SHIPPED.subjects
HELD_OUT_SUBJECTS = SHIPPED.held_out_subjects
STYLES = SHIPPED.styles
HELD_OUT_STYLES = SHIPPED.held_out_styles
BACKGROUNDS = SHIPPED.backgrounds
HELD_OUT_BACKGROUNDS = SHIPPED.held_out_backgrounds
ALL_SUBJECTS = SHIPPED.all_subjects
ALL_STYLES = SHIPPED.all_styles
ALL_BACKGROUNDS = SHIPPED.all_backgrounds
