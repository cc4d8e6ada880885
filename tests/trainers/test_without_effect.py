"""Settings that do nothing are said to do nothing."""

from typing import Any

import pytest

from studio.specs import TrainSpec, parse_spec
from studio.trainers.without_effect import without_effect

NEEDED = {"data": "pictures", "output": "a.safetensors"}


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ({"text_encoder_learning_rate": 1e-5}, {"train_text_encoder": True}),
        ({"token_learning_rate": 1e-2}, {"token": "sks"}),
        ({"init_batches": 2}, {"init": "eva"}),
        ({"sample_prompts": ["a fox"]}, {"sample_every": 5}),
        ({"sample_steps": 7}, {"class_prompts": ["a dog"]}),
        ({"cache_folder": "c"}, {"cache": "disk"}),
        ({"keep_adapters": 3}, {"save_every": 5}),
        ({"class_pictures": 9}, {"class_prompts": ["a dog"]}),
        ({"prior_weight": 0.5}, {"class_data": "dogs"}),
    ],
    ids=lambda values: next(iter(values)),
)
def test_each_names_what_it_needs(values: dict[str, Any], more: dict[str, Any]) -> None:
    (said,) = without_effect(parse_spec(TrainSpec, {**NEEDED, **values}))
    (name,), (wanted,) = values, more
    assert said.startswith(f"{name} has no effect without ") and wanted.replace("class_data", "class") in said
    assert not list(without_effect(parse_spec(TrainSpec, {**NEEDED, **values, **more})))


def test_defaults_and_other_methods_options_are_no_matter() -> None:
    assert not list(without_effect(parse_spec(TrainSpec, {**NEEDED, "keep_adapters": 0, "method": "sara"})))
