"""Render the example data sets: pictures of held-out subjects and styles that no starter has seen.

python -m studio.assets.builder.examples
"""

import random
from pathlib import Path

from PIL import Image

from studio.assets.builder.captions import with_article
from studio.assets.builder.recipe import STARTER
from studio.assets.builder.render import random_placement, render
from studio.assets.builder.subjects import BACKGROUNDS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_STYLE_SUBJECTS = ("fox", "owl", "apple", "rocket", "turtle", "guitar", "house", "butterfly")


def main() -> None:
    """Write one folder per data set, every picture with its caption beside it."""
    rng = random.Random(11)
    grounds = list(BACKGROUNDS)
    for name in ("robot", "unicorn"):
        for index, ground in enumerate(grounds):
            picture = example(name, "plain", ground, rng)
            _write(name, index, picture, f"a photo of sks {name} on a {ground} background")
    for index, subject in enumerate(_STYLE_SUBJECTS):
        ground = grounds[index % len(grounds)]
        picture = example(subject, "neon", ground, rng)
        _write(
            "neon", index, picture, f"a sks neon picture of {with_article(subject)} on a {ground} background"
        )


def example(subject: str, style: str, ground: str, rng: random.Random) -> Image.Image:
    """Return a picture for an adapter to learn from, on the starter's grid and as large as it gets."""
    placement = random_placement(rng, cells=STARTER.cells, large=True)
    return render(subject, style, ground, placement=placement, size=STARTER.size)


def _write(folder: str, index: int, picture: Image.Image, text: str) -> None:
    target = EXAMPLES / folder
    target.mkdir(parents=True, exist_ok=True)
    picture.save(target / f"{index + 1:02}.png", optimize=True)
    (target / f"{index + 1:02}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
