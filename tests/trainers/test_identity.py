"""What a run that goes on must have in common with the one that was begun; the runs are in test_resume.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.data.dataset import read_dataset
from studio.errors import TrainingError
from studio.specs import TrainSpec
from studio.trainers.identity import MAY_CHANGE, Identity, check_same, identity

Spec = Callable[..., TrainSpec]
RUNS = Path(__file__).parents[2] / "docs" / "runs.md"


def identity_of(spec: TrainSpec) -> Identity:
    data = read_dataset(spec)
    sets = {"data": data.pictures, "class_data": data.class_pictures, "validation": data.validation}
    return identity(spec, base="b", precision="fp32", data=sets)


def masked(folder: Path, *, value: int = 255) -> None:
    Image.new("L", (72, 64), value).save(folder / "0.mask.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: masked(folder, value=200), "changed pictures or captions: data/0.png"),
        (lambda folder: (folder / "0.mask.png").unlink(), "changed pictures or captions: data/0.png"),
        (lambda folder: masked(folder), None),
    ],
    ids=["mask", "no-mask", "written-anew"],
)
def test_masks_count_by_what_they_hold(
    spec: Spec, folder: Path, change: Callable[[Path], Any], words: str | None
) -> None:
    masked(folder)
    before = identity_of(spec())
    change(folder)
    if words is None:
        check_same(before, identity_of(spec()), step=1)
        return
    with pytest.raises(TrainingError, match=re.escape(words)):
        check_same(before, identity_of(spec()), step=1)


def test_class_pictures_and_those_held_out_count_too(spec: Spec, folder: Path) -> None:
    before = identity_of(spec(steps=2))
    with pytest.raises(TrainingError, match=r"new pictures: class_data/0\.png, class_data/1\.png"):
        check_same(before, identity_of(spec(steps=2, class_data=folder, class_prompts=["a dog"])), step=1)
    with pytest.raises(
        TrainingError, match=r"new pictures: validation/.\.png; missing pictures: data/.\.png"
    ):
        check_same(before, identity_of(spec(steps=2, validation_split=0.25)), step=1)


def test_the_document_names_all_settings_that_may_change() -> None:
    (listed,) = re.findall(r"Only these settings may change:(.*?)`batch_size`", RUNS.read_text(), re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == MAY_CHANGE


def test_a_changed_setting_is_named_once_and_not_for_every_picture(spec: Spec) -> None:
    with pytest.raises(TrainingError, match=r"flip was False, is True\. Put it back") as caught:
        check_same(identity_of(spec()), identity_of(spec(flip=True)), step=1)
    assert "pictures" not in str(caught.value).partition("Put it back")[0]


def test_a_folder_of_its_own_settings_is_named_by_its_pictures(spec: Spec, folder: Path) -> None:
    toml = folder.with_name("set.toml")
    text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder}"\nclass_tokens = "a dog"\n'
    toml.write_text(text)
    before = identity_of(spec(data=toml))
    toml.write_text(f"{text}flip_aug = true\n")
    with pytest.raises(TrainingError, match=r"pictures with other settings of their folder: data/.*0\.png"):
        check_same(before, identity_of(spec(data=toml)), step=1)


def test_the_methods_own_rate_is_the_same_given_or_not(spec: Spec) -> None:
    own = spec(learning_rate=None)
    check_same(identity_of(own), identity_of(spec(learning_rate=own.unet_learning_rate)), step=1)
