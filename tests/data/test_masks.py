from collections.abc import Callable
from pathlib import Path

import pytest

from studio.data.dataset import read_dataset
from studio.errors import DataError
from studio.specs import TrainSpec

Save = Callable[..., Path]
Spec = Callable[..., TrainSpec]


@pytest.fixture
def dog(tmp_path: Path, save: Save) -> Path:
    save(tmp_path / "dog.png", caption="dog")
    save(tmp_path / "cat.png", caption="cat")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["dog.mask.png", "dog-mask.png", "dog-masklabel.png", "mask/dog.png", "masks/dog.jpg"]
)
def test_a_mask_is_found_beside_its_picture(dog: Path, save: Save, spec: Spec, name: str) -> None:
    save(dog / name, mode="L", color=255)
    pictures = read_dataset(spec()).pictures
    assert [picture.mask for picture in pictures.pictures] == [None, dog / name]
    assert pictures.ignored == () and len(pictures.pictures) == 2


def test_masks_that_are_off_are_neither_used_nor_taken_for_pictures(
    dog: Path, save: Save, spec: Spec
) -> None:
    save(dog / "dog.mask.png", mode="L", color=255)
    pictures = read_dataset(spec(masks="off")).pictures
    assert [picture.mask for picture in pictures.pictures] == [None, None]
    assert pictures.ignored == ("dog.mask.png",)


def test_a_file_named_like_a_mask_of_no_picture_is_a_picture_and_said(
    dog: Path, save: Save, spec: Spec
) -> None:
    save(dog / "gas-mask.png", caption="a gas mask")
    pictures = read_dataset(spec()).pictures
    assert [picture.caption for picture in pictures.pictures] == ["cat", "dog", "a gas mask"]
    assert [note.rpartition(": ")[2] for note in pictures.notes] == ["gas-mask.png."]


def test_a_mask_of_another_size_is_refused_with_both_sizes(dog: Path, save: Save, spec: Spec) -> None:
    save(dog / "dog.mask.png", mode="L", color=255, size=(12, 8))
    with pytest.raises(
        DataError, match=r"dog\.mask\.png: the mask has 12 x 8 px, its picture dog\.png 24 x 16 px"
    ):
        read_dataset(spec())


def test_two_masks_a_damaged_and_a_black_one_are_refused(dog: Path, save: Save, spec: Spec) -> None:
    save(dog / "dog.mask.png", mode="L", color=255)
    save(dog / "mask" / "dog.png", mode="L", color=255)
    with pytest.raises(DataError, match=r"dog\.png: several masks, dog\.mask\.png, dog\.png"):
        read_dataset(spec())
    (dog / "mask" / "dog.png").unlink()
    (dog / "dog.mask.png").write_text("no picture")
    with pytest.raises(DataError, match=r"dog\.mask\.png: not a picture"):
        read_dataset(spec())
    save(dog / "dog.mask.png", mode="L", color=0)
    with pytest.raises(DataError, match=r"dog\.mask\.png: black everywhere, so nothing"):
        read_dataset(spec())
    assert read_dataset(spec(unmasked_weight=0.1)).pictures.pictures[1].mask == dog / "dog.mask.png"


def test_the_alpha_channel_is_a_mask_where_asked_for(dog: Path, save: Save, spec: Spec) -> None:
    save(dog / "dog.png", mode="RGBA", color=(1, 2, 3, 128))
    assert read_dataset(spec()).pictures.pictures[1].mask is None
    pictures = read_dataset(spec(masks="alpha")).pictures.pictures
    assert [picture.mask for picture in pictures] == [None, dog / "dog.png"]
    mask = pictures[1].open_mask()
    assert mask is not None and mask.getextrema() == (128, 128) and pictures[0].open_mask() is None
    save(dog / "dog.png", mode="RGBA", color=(1, 2, 3, 0))
    with pytest.raises(DataError, match=r"dog\.png: transparent everywhere"):
        read_dataset(spec(masks="alpha"))
