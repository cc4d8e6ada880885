from collections.abc import Callable
from pathlib import Path

import pytest

from studio.data.dataset import hold_out, read_dataset
from studio.data.picture import Treatment
from studio.errors import DataError, SpecError
from studio.specs import TrainSpec, parse_spec

Save = Callable[..., Path]
Spec = Callable[..., TrainSpec]
CHANCE = {
    "shuffle_tags": True,
    "tag_dropout": 0.1,
    "caption_dropout": 0.1,
    "flip": True,
    "center_crop": False,
    "color_jitter": 0.1,
}


@pytest.fixture
def ten(tmp_path: Path, save: Save) -> Path:
    for number in range(10):
        save(tmp_path / f"{number}.png", caption=f"dog {number}")
    return tmp_path


def test_a_share_is_held_out_and_not_trained_on(ten: Path, spec: Spec) -> None:
    data = read_dataset(spec(validation_split=0.3))
    assert data.validation is not None
    held = {picture.path for picture in data.validation.pictures}
    trained = {picture.path for picture in data.pictures.pictures}
    assert len(held) == 3 and len(trained) == 7 and not held & trained
    assert read_dataset(spec(validation_split=0.3)).validation == data.validation
    others = [read_dataset(spec(validation_split=0.3, seed=seed)).validation for seed in range(1, 4)]
    assert any(other != data.validation for other in others)


def test_one_more_picture_moves_at_most_one_between_the_parts(ten: Path, spec: Spec, save: Save) -> None:
    before = read_dataset(spec()).pictures
    save(ten / "new.png", caption="new")
    after = read_dataset(spec()).pictures
    for seed in range(5):
        first, second = (set(hold_out(found, 0.3, seed=seed)[1].pictures) for found in (before, after))
        assert len(first - second) <= 1


def test_at_least_one_is_held_out_and_one_left(ten: Path, spec: Spec) -> None:
    data = read_dataset(spec(validation_split=0.01))
    assert data.validation is not None and len(data.validation.pictures) == 1
    with pytest.raises(DataError, match=r"0\.99 holds out 10 of 10 pictures, which leaves none"):
        read_dataset(spec(validation_split=0.99))


def test_a_folder_of_its_own_may_be_held_out(ten: Path, spec: Spec, save: Save, tmp_path: Path) -> None:
    save(tmp_path / "held" / "2_dog" / "x.png")
    data = read_dataset(spec(validation_data=tmp_path / "held"))
    assert data.validation is not None and len(data.pictures.pictures) == 10
    (picture,) = data.validation.pictures
    assert (picture.caption, picture.repeats) == ("dog", 1)
    with pytest.raises(SpecError, match="validation_data: validation_split holds pictures out already"):
        parse_spec(
            TrainSpec,
            {"data": ten, "output": "x.safetensors", "validation_split": 0.1, "validation_data": ten},
        )
    with pytest.raises(DataError, match=r"does not exist.* validation_data \(--validation-data\)"):
        read_dataset(spec(validation_data=tmp_path / "lost"))


def test_nothing_of_held_out_pictures_is_left_to_chance_but_their_trigger_stays(
    ten: Path, spec: Spec
) -> None:
    data = read_dataset(spec(validation_split=0.2, trigger="sks", unmasked_weight=0.5, keep_tags=1, **CHANCE))
    assert data.validation is not None
    treatments = {picture.treatment for picture in data.validation.pictures}
    assert treatments == {Treatment(trigger="sks", unmasked_weight=0.5, keep_tags=1)}
    trained = data.pictures.pictures[0].treatment
    assert all(getattr(trained, name) == value for name, value in CHANCE.items())


def test_kohyas_regularisation_folder_is_read_with_its_repeats(
    ten: Path, spec: Spec, save: Save, tmp_path: Path
) -> None:
    save(tmp_path / "reg" / "2_dog" / "x.png")
    data = read_dataset(spec(class_data=tmp_path / "reg", trigger="sks", flip=True))
    assert data.class_pictures is not None
    (picture,) = data.class_pictures.pictures
    assert (picture.caption, picture.repeats) == ("dog", 2)
    assert picture.treatment == Treatment(flip=True)


def test_a_trigger_alone_is_caption_enough(tmp_path: Path, spec: Spec, save: Save) -> None:
    save(tmp_path / "a.png")
    assert read_dataset(spec(trigger="sks")).pictures.pictures[0].caption == ""
    with pytest.raises(DataError, match="without a caption and no prompt"):
        read_dataset(spec())
