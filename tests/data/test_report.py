from pathlib import Path
from typing import Any

import pytest

from studio.data.folder import Picture, PictureSet
from studio.data.report import report
from studio.specs import TrainSpec


def pictures(*sizes: tuple[int, int], own: int = 0, **more: Any) -> PictureSet:
    return PictureSet(
        Path("dogs"),
        tuple(Picture(Path(f"{i}.png"), size, "dog", i < own) for i, size in enumerate(sizes)),
        **more,
    )


def spec(**values: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {"data": "dogs", "output": "dog.safetensors", "prompt": "sks dog"} | values
    )


def test_the_report_states_pictures_sizes_captions_and_the_amount_of_training() -> None:
    text = report(
        pictures((100, 100), (900, 300), (200, 100), own=1),
        spec(steps=30, batch_size=2, gradient_accumulation=3, warmup_steps=5),
        resolution=64,
    )
    assert text.splitlines() == [
        "Pictures: 3 in dogs",
        "Sizes: smallest 100 x 100 px, median 200 x 100 px, largest 900 x 300 px",
        "Captions: 1 of their own, 2 by the prompt 'sks dog'",
        "Training: 64 x 64 px, 30 steps of batch 2 x 3 accumulated = 180 samples, 60 epochs",
    ]


def test_pictures_of_one_size_are_said_so() -> None:
    assert "Sizes: all 80 x 80 px" in report(pictures((80, 80), (80, 80), own=2), spec(), resolution=64)


@pytest.mark.parametrize(
    ("set_of", "values", "words"),
    [
        (pictures((60, 900), (70, 70)), {}, "Warning: smaller than 64 px and enlarged: 0.png."),
        (pictures((70, 70), skipped=("bad.png: damaged",)), {}, "Warning: left out: bad.png: damaged."),
        (
            pictures((70, 70), ignored=("notes.pdf",)),
            {},
            "Warning: neither a picture nor a caption of one: notes.pdf.",
        ),
        (
            pictures((70, 70)),
            {"steps": 8, "warmup_steps": 8},
            "Warning: warmup_steps (8) leave none of 8 steps",
        ),
    ],
    ids=["small", "skipped", "ignored", "warm-up"],
)
def test_what_may_be_unintended_is_warned_of(set_of: PictureSet, values: dict[str, Any], words: str) -> None:
    assert words in report(set_of, spec(**values), resolution=64)
    assert "Warning" not in report(pictures((70, 70)), spec(), resolution=64)
