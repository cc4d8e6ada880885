import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from studio.data.folder import open_picture, read_folder, read_pictures
from studio.errors import DataError
from studio.specs import TrainSpec


def save(
    path: Path,
    *,
    size: tuple[int, int] = (24, 16),
    color: str | tuple[int, ...] = "red",
    mode: str = "RGB",
    **how: object,
) -> Path:
    Image.new(mode, size, color).save(path, **how)
    return path


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


def test_captions_come_from_text_files_and_the_prompt_fills_in(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.JPG", size=(30, 20), format="JPEG")
    (tmp_path / "a.txt").write_text("\ufeffa red\n dog ", encoding="utf-8")
    pictures = read_folder(TrainSpec(data=tmp_path, output=Path("x.safetensors"), prompt="sks dog"))
    assert [(p.path.name, p.size, p.caption, p.own_caption) for p in pictures.pictures] == [
        ("a.JPG", (30, 20), "a red dog", True),
        ("b.png", (24, 16), "sks dog", False),
    ]
    assert pictures.skipped == pictures.ignored == ()


def test_an_empty_caption_counts_as_none(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(
        DataError, match=r"1 picture without a caption and no prompt for them: a\.png.*--prompt"
    ):
        read_pictures(tmp_path)
    assert read_pictures(tmp_path, prompt="dog").pictures[0].caption == "dog"


def test_a_caption_that_is_not_text_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00dog")
    with pytest.raises(DataError, match=r"a\.txt: the caption is not UTF-8"):
        read_pictures(tmp_path, prompt="dog")


def test_a_missing_folder_a_file_and_an_empty_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_pictures(tmp_path / "none", prompt="dog")
    with pytest.raises(DataError, match="is a file, not a folder"):
        read_pictures(save(tmp_path / "a.png"), prompt="dog")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_pictures(tmp_path / "empty", prompt="dog")


def test_a_folder_of_other_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    with pytest.raises(
        DataError, match=r"no pictures in .*only inner/, notes\.pdf; sub-folders are not read"
    ):
        read_pictures(tmp_path, prompt="dog")


def test_all_damaged_pictures_are_named_and_the_folder_refused(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not a picture")
    whole = save(tmp_path / "cut.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"(?s)2 pictures in .*cut\.jpg: cannot be read.*text\.png: not a picture.*--skip-bad"
    ):
        read_pictures(tmp_path, prompt="dog")


def test_skip_bad_goes_on_and_says_which(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not a picture")
    pictures = read_pictures(tmp_path, prompt="dog", skip_bad=True)
    assert [p.path.name for p in pictures.pictures] == ["good.png"]
    assert len(pictures.skipped) == 1 and pictures.skipped[0].startswith("bad.png: not a picture")


def test_skip_bad_with_nothing_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"(?s)none of the 1 picture in .* can be read.*bad\.png"):
        read_pictures(tmp_path, prompt="dog", skip_bad=True)


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


def test_the_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_picture(tmp_path / "a.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255) and upright.getpixel((10, 35)) == (0, 0, 0)
    assert read_pictures(tmp_path, prompt="dog").pictures[0].size == (20, 40)


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    save(tmp_path / "clear.png", mode="RGBA", color=(0, 0, 255, 0))
    save(tmp_path / "half.png", mode="LA", color=(0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)
    assert open_picture(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path: Path) -> None:
    save(tmp_path / "a.png", mode="I;16", color=257 * 100)
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)


def test_files_that_are_not_used_are_listed(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("dog")
    (tmp_path / "lost.txt").write_text("cat")
    (tmp_path / "inner").mkdir()
    assert read_pictures(tmp_path).ignored == ("inner/", "lost.txt")
