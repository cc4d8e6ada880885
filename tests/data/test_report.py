from pathlib import Path
from typing import Any

import pytest

from studio.data.buckets import Buckets
from studio.data.dataset import DataSet
from studio.data.picture import Picture, PictureSet, Treatment
from studio.data.report import report
from studio.specs import TrainSpec

SQUARE = Buckets.square(64)


def pictures(*sizes: tuple[int, int], own: int = 0, caption: str = "sks dog", **more: Any) -> PictureSet:
    return PictureSet(
        Path("dogs"),
        tuple(Picture(Path(f"{i}.png"), size, caption, i < own) for i, size in enumerate(sizes)),
        **more,
    )


def spec(**values: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {"data": "dogs", "output": "dog.safetensors", "prompt": "sks dog"} | values
    )


def told(given: PictureSet, run: TrainSpec | None = None, buckets: Buckets = SQUARE, **more: Any) -> str:
    return report(DataSet(given, **more), run or spec(), buckets=buckets)


def test_the_report_states_pictures_sizes_captions_and_the_amount_of_training() -> None:
    text = told(
        pictures((100, 100), (900, 300), (200, 100), own=1),
        spec(steps=30, batch_size=2, gradient_accumulation=3, warmup_steps=5),
    )
    assert text.splitlines() == [
        "Pictures: 3 in dogs",
        "Sizes: smallest 100 x 100 px, median 200 x 100 px, largest 900 x 300 px",
        "Captions: 1 of their own, 2 by the prompt 'sks dog'",
        "Training: 64 x 64 px, 30 steps of batch 2 x 3 accumulated = 180 samples, 60 epochs",
    ]


def test_pictures_of_one_size_are_said_so() -> None:
    assert "Sizes: all 80 x 80 px" in told(pictures((80, 80), (80, 80), own=2))


def test_buckets_in_use_are_listed_with_their_samples() -> None:
    buckets = Buckets(((64, 64), (96, 32), (32, 96)), 32)
    text = told(pictures((64, 64), (64, 64), (300, 100)), spec(steps=6, batch_size=1), buckets)
    assert "Training: 2 sizes, 6 steps of batch 1 = 6 samples, 2 epochs" in text
    assert "Buckets (samples an epoch): 64 x 64 px: 2, 96 x 32 px: 1" in text


def test_repeats_count_into_epochs_and_are_listed_by_folder() -> None:
    folders = [("10_dog", 10), ("10_dog", 10), ("1_cat", 1)]
    given = tuple(
        Picture(Path(name, f"{i}.png"), (64, 64), "dog", False, repeats=repeats)
        for i, (name, repeats) in enumerate(folders)
    )
    text = told(PictureSet(Path("x"), given), spec(steps=21, batch_size=2))
    assert "Repeats: 10_dog 2 x 10, 1_cat 1 x 1 = 21 samples an epoch" in text
    assert "= 42 samples, 2 epochs" in text
    assert "Captions: 0 of their own, 3 by folder or file 'dog'" in text


def test_the_most_frequent_tags_are_counted_where_there_are_tags() -> None:
    assert "Tags" not in told(pictures((64, 64)))
    treatment = Treatment(trigger="sks")
    given = (
        Picture(Path("a.png"), (64, 64), "dog, sofa", True, repeats=2, treatment=treatment),
        Picture(Path("b.png"), (64, 64), "dog, night", True, treatment=treatment),
    )
    text = told(PictureSet(Path("x"), given))
    assert "Tags (samples an epoch): 'sks' 3, 'dog' 3, 'sofa' 2, 'night' 1\n" in text
    many = ", ".join(f"tag{number:02}" for number in range(12))
    assert "'tag09' 1, of 12 different ones" in told(pictures((64, 64), caption=many))


def test_masks_class_pictures_and_what_is_held_out_are_counted() -> None:
    given = PictureSet(Path("x"), (Picture(Path("a.png"), (64, 64), "dog", True, mask=Path("a.mask.png")),))
    text = told(given, class_pictures=pictures((64, 64)), validation=pictures((64, 64), (64, 64)))
    assert "Masks: 1 of 1 pictures" in text
    assert "Class pictures: 1 in dogs; weight 1" in text
    assert "Held out: 2 pictures of dogs" in text


@pytest.mark.parametrize(
    ("set_of", "values", "words"),
    [
        (
            pictures((60, 900), (70, 70)),
            {},
            "Warning: smaller than they are trained in and enlarged: 0.png.",
        ),
        (pictures((70, 70), skipped=("bad.png: damaged",)), {}, "Warning: left out: bad.png: damaged."),
        (pictures((70, 70), ignored=("notes.pdf",)), {}, "Warning: lies there and is not used: notes.pdf."),
        (pictures((70, 70), notes=("something odd.",)), {}, "Warning: something odd."),
        (
            pictures((70, 70)),
            {"steps": 8, "warmup_steps": 8},
            "Warning: warmup_steps (8) leave none of 8 steps",
        ),
    ],
    ids=["small", "skipped", "ignored", "noted", "warm-up"],
)
def test_what_may_be_unintended_is_warned_of(set_of: PictureSet, values: dict[str, Any], words: str) -> None:
    assert words in told(set_of, spec(**values))
    assert "Warning" not in told(pictures((70, 70)))
