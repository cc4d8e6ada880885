from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio.data.batches import Samples, square_box, to_tensor
from studio.data.folder import read_pictures
from studio.specs import TrainSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 32), color)
        image.paste("white", (0, 0, 8, 32))
        image.save(tmp_path / f"{index}.png")
    return tmp_path


def samples(folder: Path, **values: Any) -> Samples:
    spec = TrainSpec.model_validate({"data": folder, "output": "x.safetensors", "prompt": "dog"} | values)
    return Samples(read_pictures(folder, prompt="dog"), spec, resolution=16, num_timesteps=1000)


def test_a_sample_depends_on_seed_and_index_alone(folder: Path) -> None:
    course = samples(folder, seed=3, flip=True, center_crop=False)
    later = course[7]
    _ = [course[i] for i in range(7)]
    assert samples(folder, seed=3, flip=True, center_crop=False)[7] == later == course[7]
    assert samples(folder, seed=4, flip=True, center_crop=False)[7] != later
    first, second = (samples(folder, seed=3).noise(later, (4, 2, 2)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], course.noise(course[8], (4, 2, 2))[1])


def test_every_epoch_holds_every_picture_once_in_its_own_order(folder: Path) -> None:
    course = samples(folder)
    epochs = [tuple(course[3 * epoch + place].picture for place in range(3)) for epoch in range(12)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_timesteps_cover_the_schedule(folder: Path) -> None:
    course = samples(folder)
    drawn = [course[i].timestep for i in range(400)]
    assert min(drawn) < 30 and max(drawn) > 970 and abs(sum(drawn) / 400 - 500) < 60


@pytest.mark.parametrize("option", ["flip", "center_crop", "caption_dropout"])
def test_an_option_changes_only_what_it_names(folder: Path, option: str) -> None:
    changed_value: dict[str, Any] = {"flip": True, "center_crop": False, "caption_dropout": 0.5}
    plain, changed = samples(folder), samples(folder, **{option: changed_value[option]})
    touched = {
        "flip": {"flip", "variant"},
        "center_crop": {"box", "variant"},
        "caption_dropout": {"caption"},
    }[option]
    differing = {
        field
        for i in range(40)
        for field in vars(plain[i])
        if getattr(plain[i], field) != getattr(changed[i], field)
    }
    assert differing == touched


def test_caption_dropout_takes_its_share(folder: Path) -> None:
    course = samples(folder, caption_dropout=0.25)
    assert 70 <= sum(course[i].caption == "" for i in range(400)) <= 130


def test_pixels_are_cut_resized_and_mirrored() -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 32, 32))
    values = to_tensor(image, box=square_box(image.size), resolution=16)
    assert values.shape == (3, 16, 16) and values.dtype == torch.float32
    assert values[:, 8, 2].tolist() == pytest.approx(
        [1.0] * 3, abs=0.02
    )  # the filter rings by a level or two
    assert values[:, 8, 13].tolist() == pytest.approx([-1.0] * 3, abs=0.02)  # the same
    mirrored = to_tensor(image, box=square_box(image.size), resolution=16, flip=True)
    assert torch.equal(mirrored, values.flip(-1))


def test_a_very_long_picture_is_not_enlarged_as_a_whole() -> None:
    image = Image.new("RGB", (200_000, 1), "white")
    assert to_tensor(image, box=square_box(image.size), resolution=512).shape == (3, 512, 512)


def test_size_conditions_follow_the_crop(folder: Path) -> None:
    course = samples(folder, center_crop=False)
    sample = course[0]
    left = sample.box[0]
    assert 0 <= left <= 32 and sample.box == (left, 0, left + 32, 32)
    assert course.size_conditions(sample) == (32, 64, 0, round(left / 2), 16, 16)
    assert samples(folder).size_conditions(samples(folder)[0]) == (32, 64, 0, 8, 16, 16)
