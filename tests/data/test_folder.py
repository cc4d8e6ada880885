from collections.abc import Callable
from pathlib import Path

import pytest

from studio.data.folder import read_pictures
from studio.errors import DataError

Save = Callable[..., Path]


def test_captions_come_from_text_files_and_the_prompt_fills_in(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.JPG", size=(30, 20), format="JPEG")
    (tmp_path / "a.txt").write_text("\ufeffa red\n dog ", encoding="utf-8")
    pictures = read_pictures(tmp_path, prompt="sks dog")
    assert [(p.path.name, p.size, p.caption, p.own_caption) for p in pictures.pictures] == [
        ("a.JPG", (30, 20), "a red dog", True),
        ("b.png", (24, 16), "sks dog", False),
    ]
    assert pictures.skipped == pictures.ignored == ()


def test_an_empty_caption_counts_as_none(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(
        DataError, match=r"1 picture without a caption and no prompt for them: a\.png.*--prompt"
    ):
        read_pictures(tmp_path)
    assert read_pictures(tmp_path, prompt="dog").pictures[0].caption == "dog"


def test_a_caption_that_is_not_text_is_named(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00dog")
    with pytest.raises(DataError, match=r"a\.txt: the caption is not UTF-8"):
        read_pictures(tmp_path, prompt="dog")


def test_a_missing_folder_a_file_and_an_empty_folder_are_said(tmp_path: Path, save: Save) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_pictures(tmp_path / "none", prompt="dog")
    with pytest.raises(DataError, match="is a file, not a folder"):
        read_pictures(save(tmp_path / "a.png"), prompt="dog")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_pictures(tmp_path / "empty", prompt="dog")


def test_a_folder_of_other_files_names_them(tmp_path: Path, save: Save) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    with pytest.raises(
        DataError,
        match=r"no pictures in .*only inner/, notes\.pdf; sub-folders are read if .* named like 10_dog",
    ):
        read_pictures(tmp_path, prompt="dog")


def test_all_damaged_pictures_are_named_and_the_folder_refused(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not a picture")
    whole = save(tmp_path / "cut.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"(?s)2 pictures in .*cut\.jpg: cannot be read.*text\.png: not a picture.*--skip-bad"
    ):
        read_pictures(tmp_path, prompt="dog")


def test_skip_bad_goes_on_and_says_which(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not a picture")
    pictures = read_pictures(tmp_path, prompt="dog", skip_bad=True)
    assert [p.path.name for p in pictures.pictures] == ["good.png"]
    assert len(pictures.skipped) == 1 and pictures.skipped[0].startswith("bad.png: not a picture")


def test_skip_bad_with_nothing_left_is_refused(tmp_path: Path, save: Save) -> None:
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"(?s)none of the 1 picture in .* can be read.*bad\.png"):
        read_pictures(tmp_path, prompt="dog", skip_bad=True)


def test_files_that_are_not_used_are_listed(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("dog")
    (tmp_path / "lost.txt").write_text("cat")
    (tmp_path / "inner").mkdir()
    assert read_pictures(tmp_path).ignored == ("inner/", "lost.txt")
