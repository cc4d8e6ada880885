import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.data.dataset import read_dataset
from studio.errors import DataError
from studio.specs import TrainSpec

Save = Callable[..., Path]
Spec = Callable[..., TrainSpec]


def found(spec: TrainSpec) -> list[tuple[str, str, int]]:
    pictures = read_dataset(spec).pictures.pictures
    return [(f"{p.path.parent.name}/{p.path.name}", p.caption, p.repeats) for p in pictures]


def write_list(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_kohyas_folders_give_repeats_and_captions_by_their_names(
    tmp_path: Path, save: Save, spec: Spec
) -> None:
    save(tmp_path / "10_sks dog" / "a.png")
    save(tmp_path / "10_sks dog" / "b.png", caption="a dog on a sofa")
    save(tmp_path / "2_cat" / "c.png")
    (tmp_path / "log").mkdir()
    assert found(spec()) == [
        ("10_sks dog/a.png", "sks dog", 10),
        ("10_sks dog/b.png", "a dog on a sofa", 10),
        ("2_cat/c.png", "cat", 2),
    ]
    assert read_dataset(spec()).pictures.epoch_size == 22
    save(tmp_path / "1.5_dog" / "d.png")
    assert read_dataset(spec()).pictures.ignored == ("1.5_dog/", "log/")


def test_a_prompt_wins_over_a_folders_name_and_a_caption_file_over_both(
    tmp_path: Path, save: Save, spec: Spec
) -> None:
    save(tmp_path / "1_dog" / "a.png")
    save(tmp_path / "1_dog" / "b.png", caption="own")
    assert [caption for _, caption, _ in found(spec(prompt="a photo of a dog"))] == [
        "a photo of a dog",
        "own",
    ]


def test_one_of_kohyas_folders_may_be_given_itself(tmp_path: Path, save: Save, spec: Spec) -> None:
    save(tmp_path / "3_dog" / "a.png")
    assert found(spec(data=tmp_path / "3_dog")) == [("3_dog/a.png", "dog", 3)]


def test_pictures_beside_folders_with_repeats_are_refused(tmp_path: Path, save: Save, spec: Spec) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "3_dog" / "b.png")
    with pytest.raises(DataError, match=r"holds pictures \(a\.png\) beside folders .*\(3_dog\)"):
        read_dataset(spec(prompt="dog"))


def test_a_folder_above_is_answered_with_the_one_that_is_meant(
    tmp_path: Path, save: Save, spec: Spec
) -> None:
    save(tmp_path / "img" / "3_dog" / "b.png")
    (tmp_path / "log").mkdir()
    with pytest.raises(DataError, match=r"only img/, log/; .* Did you mean .*/img\?"):
        read_dataset(spec())
    assert found(spec(data=tmp_path / "img")) == [("3_dog/b.png", "dog", 3)]


def test_an_empty_folder_with_repeats_and_no_repeats_at_all_are_said(
    tmp_path: Path, save: Save, spec: Spec
) -> None:
    save(tmp_path / "1_dog" / "a.png")
    (tmp_path / "2_cat").mkdir()
    with pytest.raises(DataError, match=r"no pictures in .*2_cat"):
        read_dataset(spec())
    (tmp_path / "2_cat").rename(tmp_path / "0_cat")
    with pytest.raises(DataError, match=r"the name asks for no repeats\. Rename it to 1_cat"):
        read_dataset(spec())


def test_problems_name_the_folder_of_a_picture(tmp_path: Path, save: Save, spec: Spec) -> None:
    save(tmp_path / "1_dog" / "a.png")
    (tmp_path / "2_cat").mkdir()
    (tmp_path / "2_cat" / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"2_cat/b\.png: not a picture"):
        read_dataset(spec())


def test_metadata_jsonl_lists_pictures_and_captions(tmp_path: Path, save: Save, spec: Spec) -> None:
    save(tmp_path / "a.png", caption="not this")
    save(tmp_path / "train" / "b.png", caption="beside")
    save(tmp_path / "unlisted.png")
    write_list(tmp_path, {"file_name": "a.png", "text": "a\n dog"}, {"file_name": "train/b.png", "n": 1}, "")
    assert [(name.split("/")[1], caption) for name, caption, _ in found(spec())] == [
        ("a.png", "a dog"),
        ("b.png", "beside"),
    ]
    assert read_dataset(spec()).pictures.ignored == ("unlisted.png",)


def test_all_bad_lines_of_a_list_are_named(tmp_path: Path, save: Save, spec: Spec) -> None:
    save(tmp_path / "a.png")
    write_list(
        tmp_path,
        {"file_name": "a.png", "text": "dog"},
        {"file_name": "lost.png", "text": "dog"},
        {"file_name": "../a.png", "text": "dog"},
        {"file_name": "a.png", "text": "cat"},
        {"text": "dog"},
    )
    with pytest.raises(DataError) as caught:
        read_dataset(spec())
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1] == "line 2: lost.png is not there, or not a picture file"
    assert lines[2].startswith("line 3: ../a.png lies outside")
    assert lines[3] == "line 4: a.png is listed twice"
    assert lines[4].startswith("line 5: file_name and text must be texts")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("{",), r"line 1: not JSON"),
        (("[]",), r"line 1: wanted an object"),
        (("",), "lists no pictures"),
        (({"file_name": "a.png", "caption": "dog"},), "wanted them as 'text', got caption"),
    ],
    ids=["no-json", "no-object", "empty", "other-key"],
)
def test_a_list_that_cannot_be_used_says_why(
    tmp_path: Path, save: Save, spec: Spec, rows: tuple[Any, ...], words: str
) -> None:
    save(tmp_path / "a.png")
    write_list(tmp_path, *rows)
    with pytest.raises(DataError, match=words):
        read_dataset(spec())
