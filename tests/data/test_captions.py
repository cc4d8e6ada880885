from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.data.captions import draw_caption, full_caption, tag_frequency, tags
from studio.data.folder import Subset, read_subsets
from studio.data.picture import Picture, Treatment
from studio.errors import DataError

Save = Callable[..., Path]


def picture(caption: str, **values: Any) -> Picture:
    return Picture(Path("a.png"), (8, 8), caption, True, treatment=Treatment(**values))


def drawn(given: Picture, number: int = 200) -> list[str]:
    return [draw_caption(given, torch.Generator().manual_seed(seed)) for seed in range(number)]


def test_a_caption_is_left_as_it_is_unless_its_tags_are_touched() -> None:
    text = "a dog,on a sofa ,  at night"
    assert set(drawn(picture(text))) == {text}
    assert set(drawn(picture(text, tag_dropout=0.0, keep_tags=2))) == {text}


def test_shuffling_makes_every_order_of_the_loose_tags_and_keeps_the_first() -> None:
    found = Counter(drawn(picture("one, two, three, four", shuffle_tags=True, keep_tags=1), 600))
    assert len(found) == 6 and all(text.startswith("one, ") for text in found)
    assert min(found.values()) > 60, "each of six orders is to come about 100 times"


def test_tag_dropout_takes_its_share_of_the_loose_tags() -> None:
    found = drawn(picture("one, two, three", tag_dropout=0.3, keep_tags=1), 1000)
    assert all(text.startswith("one") for text in found)
    for tag in ("two", "three"):
        assert 240 <= sum(tag not in text for text in found) <= 360
    assert set(drawn(picture("one, two", tag_dropout=1.0))) == {""}


def test_which_tags_are_dropped_does_not_depend_on_shuffling() -> None:
    plain = drawn(picture("one, two, three, four", tag_dropout=0.5))
    shuffled = drawn(picture("one, two, three, four", tag_dropout=0.5, shuffle_tags=True))
    assert [sorted(tags(text, ",")) for text in plain] == [sorted(tags(text, ",")) for text in shuffled]
    assert plain != shuffled


def test_tags_are_parted_and_joined_by_the_separator() -> None:
    assert tags(" a b ; c;; d", ";") == ["a b", "c", "d"]
    assert set(drawn(picture("a; b", shuffle_tags=True, tag_separator=";"))) == {"a; b", "b; a"}
    assert set(drawn(picture("a b", shuffle_tags=True, tag_separator=" "))) == {"a b", "b a"}


@pytest.mark.parametrize(
    ("caption", "full"),
    [
        ("a dog", "sks, a dog"),
        ("a SKS dog", "a SKS dog"),
        ("asks a dog", "sks, asks a dog"),
        ("dog, sks", "dog, sks"),
        ("", "sks"),
    ],
)
def test_the_trigger_word_stands_in_front_unless_the_caption_holds_it(caption: str, full: str) -> None:
    assert full_caption(picture(caption, trigger="sks")) == full


def test_a_trigger_of_several_words_is_found_as_a_whole() -> None:
    assert full_caption(picture("a photo of sks dog.", trigger="sks dog")) == "a photo of sks dog."
    assert full_caption(picture("sks and dog", trigger="sks dog")) == "sks dog, sks and dog"


@pytest.mark.parametrize(
    ("trigger", "caption", "holds"),
    [
        ("<dog>", "a dog", False),
        ("<dog>", "a photo of <dog>, at night", True),
        ("<dog>", "a <DOG>", True),
        ("dog", "a <dog>", True),
        ("sks-dog", "sks dog", False),
        ("sks dog", "sks_dog", False),
        ("sks", "sks_dog", True),
        ("sks dog", "a photo of\nsks  dog", True),
        ("a+b", "aab", False),
        ("<s1>", "<s1><s2> dog", True),
    ],
)
def test_a_trigger_with_marks_in_it_is_found_with_its_marks(trigger: str, caption: str, holds: bool) -> None:
    wanted = caption if holds else f"{trigger}, {caption}"
    assert full_caption(picture(caption, trigger=trigger)) == wanted


def test_the_trigger_word_survives_shuffling_and_dropping() -> None:
    found = drawn(picture("dog, sks, sofa", trigger="sks", shuffle_tags=True, tag_dropout=0.6))
    assert all("sks" in tags(text, ",") for text in found) and len(set(found)) > 4


def test_tag_frequency_counts_repeats_and_the_trigger() -> None:
    first = Picture(Path("a.png"), (8, 8), "dog, sofa", True, repeats=3, treatment=Treatment(trigger="sks"))
    second = Picture(Path("b.png"), (8, 8), "dog, dog", True)
    assert tag_frequency([first, second]) == {"sks": 3, "dog": 4, "sofa": 3}


def read(folder: Path, **values: Any) -> list[str]:
    found = read_subsets([Subset(folder, fallback="none", **values)], root=folder)
    return [picture.caption for picture in found.pictures]


def test_the_caption_extension_is_the_one_asked_for_or_any(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png", caption="text")
    save(tmp_path / "b.png")
    (tmp_path / "b.caption").write_text("other")
    (tmp_path / "b.npz").write_bytes(b"\x00\xff")
    assert read(tmp_path) == ["text", "none"]
    assert read(tmp_path, extension=".caption") == ["none", "other"]
    assert read(tmp_path, extension=".*") == ["text", "other"]


def test_two_captions_of_one_picture_are_refused_where_either_would_do(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png", caption="text")
    (tmp_path / "a.caption").write_text("other")
    with pytest.raises(DataError, match=r"a\.png: several captions, a\.txt, a\.caption.*--caption-extension"):
        read(tmp_path, extension=".*")


def test_a_prefix_and_a_suffix_go_round_every_caption(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png", caption="dog")
    save(tmp_path / "b.png")
    assert read(tmp_path, prefix="best,", suffix=", from side") == [
        "best, dog , from side",
        "best, none , from side",
    ]
