import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from studio.data.decode import open_alpha, open_mask, open_picture
from studio.data.folder import read_pictures
from studio.errors import DataError

Save = Callable[..., Path]


def header_only_png(path: Path, width: int, height: int) -> None:
    """Write a picture whose header says its size and whose pixels are missing: decoding it cannot work."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 20_000), (12_000, 10_000)], ids=["past-pil-error", "past-pil-warning"]
)
def test_a_huge_picture_is_refused_undecoded_with_its_size_and_the_limit(
    tmp_path: Path, width: int, height: int
) -> None:
    header_only_png(tmp_path / "huge.png", width, height)
    with pytest.raises(
        DataError, match=rf"huge\.png: {width:,} x {height:,} px is too large, at most 100,000,000 pixels"
    ):
        read_pictures(tmp_path, prompt="dog")


def test_the_exif_orientation_turns_the_picture(tmp_path: Path, save: Save) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_picture(tmp_path / "a.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255) and upright.getpixel((10, 35)) == (0, 0, 0)
    assert read_pictures(tmp_path, prompt="dog").pictures[0].size == (20, 40)


def test_transparent_parts_become_white(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "clear.png", mode="RGBA", color=(0, 0, 255, 0))
    save(tmp_path / "half.png", mode="LA", color=(0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)
    assert open_picture(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png", mode="I;16", color=257 * 100)
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)


def test_a_mask_is_grey_and_upright(tmp_path: Path, save: Save) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    mask = open_mask(save(tmp_path / "a.png", size=(40, 20), color=(90, 90, 90), exif=exif))
    assert (mask.mode, mask.size, mask.getpixel((0, 0))) == ("L", (20, 40), 90)


def test_the_alpha_channel_is_read_where_there_is_one(tmp_path: Path, save: Save) -> None:
    alpha = open_alpha(save(tmp_path / "a.png", mode="RGBA", color=(1, 2, 3, 77)))
    assert alpha is not None and alpha.getpixel((0, 0)) == 77
    assert open_alpha(save(tmp_path / "b.png")) is None
