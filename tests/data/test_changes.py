from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.data.changes import check_unchanged, snapshot
from studio.data.dataset import read_dataset
from studio.errors import DataError
from studio.specs import TrainSpec

Save = Callable[..., Path]
Spec = Callable[..., TrainSpec]


@pytest.fixture
def dogs(tmp_path: Path, save: Save) -> Path:
    folder = tmp_path / "dogs"
    for name in "abc":
        save(folder / f"{name}.png", caption=f"dog {name}")
    save(folder / "a.mask.png", mode="L", color=255)
    return folder


def test_what_is_the_same_passes_also_after_being_written_anew(dogs: Path, spec: Spec, save: Save) -> None:
    before = snapshot(read_dataset(spec(data=dogs)))
    check_unchanged(before, read_dataset(spec(data=dogs)))
    save(dogs / "a.png", caption="dog a")
    check_unchanged(before, read_dataset(spec(data=dogs)))
    check_unchanged(before, read_dataset(spec(data=dogs, steps=7, seed=3)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, save: save(folder / "d.png", caption="dog d"), r"added: dogs/d\.png"),
        (lambda folder, save: (folder / "b.png").unlink(), r"removed: dogs/b\.png"),
        (lambda folder, save: save(folder / "b.png", color="blue"), r"changed: dogs/b\.png"),
        (lambda folder, save: (folder / "b.txt").write_text("cat"), r"changed: dogs/b\.png"),
        (lambda folder, save: save(folder / "a.mask.png", mode="L", color=200), r"changed: dogs/a\.png"),
        (lambda folder, save: (folder / "a.mask.png").unlink(), r"changed: dogs/a\.png"),
    ],
    ids=["added", "removed", "picture", "caption", "mask", "no-mask"],
)
def test_every_change_is_named(
    dogs: Path, spec: Spec, save: Save, change: Callable[[Path, Save], Any], words: str
) -> None:
    before = snapshot(read_dataset(spec(data=dogs)))
    change(dogs, save)
    with pytest.raises(DataError, match=rf"(?s)no longer those .*  {words}\nA run that goes on"):
        check_unchanged(before, read_dataset(spec(data=dogs)))


def test_settings_of_samples_and_the_other_sets_count_too(dogs: Path, spec: Spec) -> None:
    before = snapshot(read_dataset(spec(data=dogs)))
    with pytest.raises(DataError, match=r"changed: dogs/a\.png, dogs/b\.png, dogs/c\.png"):
        check_unchanged(before, read_dataset(spec(data=dogs, flip=True)))
    with pytest.raises(DataError, match=r"added: class dogs/a\.png"):
        check_unchanged(before, read_dataset(spec(data=dogs, class_data=dogs)))
    with pytest.raises(DataError, match=r"added: held-out dogs/.\.png\n  removed: dogs/"):
        check_unchanged(before, read_dataset(spec(data=dogs, validation_split=0.3)))
