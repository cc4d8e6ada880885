from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from studio.data.batches import Samples, derived_seed, to_tensor
from studio.data.buckets import Buckets, cover_box
from studio.data.folder import read_pictures
from studio.data.picture import Treatment

SQUARE = Buckets.square(16)
WIDE = Buckets(((32, 16),), 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 32), color)
        image.paste("white", (0, 0, 8, 32))
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"dog, {color}, wall, sky")
    return tmp_path


def samples(
    folder: Path, *, seed: int = 0, buckets: Buckets = SQUARE, group: int = 1, **values: Any
) -> Samples:
    pictures = read_pictures(folder, prompt="dog", treatment=Treatment(**values))
    return Samples(pictures, seed=seed, buckets=buckets, num_timesteps=1000, group=group)


def test_a_sample_depends_on_seed_and_index_alone(folder: Path) -> None:
    chance = {"flip": True, "center_crop": False, "shuffle_tags": True, "color_jitter": 0.2}
    course = samples(folder, seed=3, **chance)
    later = course[7]
    _ = [course[i] for i in range(7)]
    assert samples(folder, seed=3, **chance)[7] == later == course[7]
    assert samples(folder, seed=4, **chance)[7] != later
    first, second = (samples(folder, seed=3).noise(later, (4, 2, 2)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], course.noise(course[8], (4, 2, 2))[1])


def test_every_epoch_holds_every_picture_once_in_its_own_order(folder: Path) -> None:
    course = samples(folder)
    epochs = [tuple(course[3 * epoch + place].picture for place in range(3)) for epoch in range(12)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("group", [1, 4])
def test_with_one_size_the_order_is_one_permutation_an_epoch_whatever_the_batch(
    folder: Path, group: int
) -> None:
    course = samples(folder, seed=5, group=group)
    for epoch in range(4):
        generator = torch.Generator().manual_seed(derived_seed(5, epoch, 0, "order"))
        wanted = torch.randperm(3, generator=generator).tolist()
        assert [course[3 * epoch + place].picture for place in range(3)] == wanted


def test_timesteps_cover_the_schedule(folder: Path) -> None:
    course = samples(folder)
    drawn = [course[i].timestep for i in range(400)]
    assert min(drawn) < 30 and max(drawn) > 970 and abs(sum(drawn) / 400 - 500) < 60
    generator = torch.Generator().manual_seed(derived_seed(0, 1, 5, "sample"))
    torch.rand(3, generator=generator, dtype=torch.float64)
    assert drawn[5] == int(torch.randint(1000, (), generator=generator))


def test_timesteps_of_a_range_are_drawn_and_nothing_else_changes(folder: Path) -> None:
    pictures = read_pictures(folder, prompt="dog", treatment=Treatment(flip=True, center_crop=False))
    common: dict[str, Any] = {"seed": 0, "buckets": SQUARE}
    course = Samples(pictures, num_timesteps=204, first_timestep=200, **common)
    whole = Samples(pictures, num_timesteps=1000, **common)
    assert {course[i].timestep for i in range(40)} == {200, 201, 202, 203}
    assert all(replace(course[i], timestep=whole[i].timestep) == whole[i] for i in range(4))


@pytest.mark.parametrize(
    ("option", "touched"),
    [
        ({"flip": True}, {"flip"}),
        ({"center_crop": False}, {"box", "recurs"}),
        ({"caption_dropout": 0.5}, {"caption"}),
        ({"shuffle_tags": True}, {"caption"}),
        ({"tag_dropout": 0.5}, {"caption"}),
        ({"trigger": "sks"}, {"caption"}),
        ({"color_jitter": 0.3}, {"color", "recurs"}),
        ({"unmasked_weight": 0.5}, set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_option_changes_only_what_it_names(
    folder: Path, option: dict[str, Any], touched: set[str]
) -> None:
    plain, changed = samples(folder), samples(folder, **option)
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


def test_captions_that_are_drawn_anew_do_not_recur(folder: Path) -> None:
    assert samples(folder, trigger="sks").recurring_captions == {
        "",
        *(f"sks, dog, {color}, wall, sky" for color in ("red", "green", "blue")),
    }
    assert samples(folder, shuffle_tags=True).recurring_captions == {""}


def test_pixels_are_cut_resized_and_mirrored() -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 32, 32))
    box = cover_box(image.size, (16, 16))
    values = to_tensor(image, box=box, size=(16, 16))
    assert values.shape == (3, 16, 16) and values.dtype == torch.float32
    assert values[:, 8, 2].tolist() == pytest.approx(
        [1.0] * 3, abs=0.02
    )  # the filter rings by a level or two
    assert values[:, 8, 13].tolist() == pytest.approx([-1.0] * 3, abs=0.02)  # the same
    mirrored = to_tensor(image, box=box, size=(16, 16), flip=True)
    assert torch.equal(mirrored, values.flip(-1))
    assert to_tensor(image, box=(0, 0, 64, 32), size=(32, 16)).shape == (3, 16, 32)


def test_color_factors_change_brightness_contrast_and_saturation() -> None:
    image = Image.new("RGB", (4, 4), (100, 50, 0))

    def first_pixel(*color: float) -> list[float]:
        values = to_tensor(image, box=(0, 0, 4, 4), size=(4, 4), color=color)  # type: ignore[arg-type]
        return ((values[:, 0, 0] + 1) * 127.5).tolist()

    assert first_pixel(1.0, 1.0, 1.0) == pytest.approx([100, 50, 0], abs=0.1)  # fp32
    assert first_pixel(1.5, 1.0, 1.0) == pytest.approx([150, 75, 0], abs=1)  # whole levels
    grey = 0.299 * 100 + 0.587 * 50
    assert first_pixel(1.0, 1.0, 0.0) == pytest.approx([grey] * 3, abs=1)
    assert first_pixel(1.0, 0.0, 1.0) == pytest.approx([grey] * 3, abs=1)


def test_color_jitter_stays_in_its_range(folder: Path) -> None:
    course = samples(folder, color_jitter=0.3)
    drawn = torch.tensor([course[i].color for i in range(200)])
    assert drawn.min() >= 0.7 and drawn.max() <= 1.3 and drawn.std() > 0.15
    assert samples(folder)[0].color is None


def test_a_very_long_picture_is_not_enlarged_as_a_whole() -> None:
    image = Image.new("RGB", (200_000, 1), "white")
    box = cover_box(image.size, (512, 512))
    assert to_tensor(image, box=box, size=(512, 512)).shape == (3, 512, 512)


def test_size_conditions_follow_the_crop(folder: Path) -> None:
    course = samples(folder, center_crop=False)
    sample = course[0]
    left = sample.box[0]
    assert 0 <= left <= 32 and sample.box == (left, 0, left + 32, 32)
    assert course.size_conditions(sample) == (32, 64, 0, round(left / 2), 16, 16)
    assert samples(folder).size_conditions(samples(folder)[0]) == (32, 64, 0, 8, 16, 16)


def test_size_conditions_of_a_bucket_are_its_own_height_and_width(folder: Path) -> None:
    course = samples(folder, buckets=WIDE)
    assert course[0].box == (0, 0, 64, 32)
    assert course.size_conditions(course[0]) == (32, 64, 0, 0, 16, 32)


def test_a_mirrored_crop_is_told_where_it_lies_in_the_mirrored_picture(folder: Path) -> None:
    course = samples(folder, center_crop=False, flip=True)
    sample = next(found for index in range(20) if (found := course[index]).flip)
    assert course.size_conditions(sample)[3] == round((64 - sample.box[2]) / 2)


def test_a_mask_is_cut_and_mirrored_with_its_picture_and_averaged_over_latents(folder: Path) -> None:
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (16, 0, 24, 32))
    mask.save(folder / "0.mask.png")
    course = samples(folder, flip=True)
    drawn = [course[index] for index in range(30)]
    plain = next(sample for sample in drawn if sample.picture == 0 and not sample.flip)
    mirrored = next(sample for sample in drawn if sample.picture == 0 and sample.flip)
    other = next(sample for sample in drawn if sample.picture == 1)
    # The middle square holds columns 16 to 48; each of two latents is the mean of 16 of them.
    assert rows(course.mask(plain, (2, 2))) == [[0.5, 0.0], [0.5, 0.0]]
    assert rows(course.mask(mirrored, (2, 2))) == [[0.0, 0.5], [0.0, 0.5]]
    assert course.mask(other, (2, 2)) is None
    assert rows(samples(folder, unmasked_weight=0.2).mask(plain, (2, 2)))[0] == pytest.approx([0.6, 0.2])


def rows(mask: torch.Tensor | None) -> list[list[float]]:
    assert mask is not None and mask.shape[0] == 1
    return mask[0].tolist()
