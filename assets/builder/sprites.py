"""Cut the glyph sprites out of the font once; they are committed, so building and testing need no font.

python -m studio.assets.builder.sprites /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from studio.assets.builder.subjects import FULL

SPRITES = Path(__file__).resolve().parent.parent / "sprites"
STRIKE = 109  # the only bitmap size that the colour font holds
SIDE = 128


def cut_sprite(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """Return the glyph as a ``SIDE`` x ``SIDE`` RGBA picture, centred and cropped to its ink."""
    canvas = Image.new("RGBA", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(canvas).text((SIDE // 2, SIDE // 2), glyph, font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    """Write one PNG per subject."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("font", type=Path, help="path of NotoColorEmoji.ttf (Debian: fonts-noto-color-emoji)")
    font = ImageFont.truetype(str(parser.parse_args().font), STRIKE)
    SPRITES.mkdir(exist_ok=True)
    for subject in FULL.all_subjects:
        cut_sprite(font, subject.glyph).save(SPRITES / f"{subject.name}.png", optimize=True)


if __name__ == "__main__":
    main()
