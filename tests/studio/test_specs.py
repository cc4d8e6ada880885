import json

import pytest
from pydantic import ValidationError

from studio.errors import SpecError
from studio.specs import AdapterUse, GenerateSpec, TrainSpec, known_fields, parse_spec

TRAIN = {"data": "pictures", "output": "x.safetensors"}


def test_all_problems_of_fields_and_options_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(
            TrainSpec, {"rank": 0, "steps": 0, "lerning_rate": 1, "format": "kohay", "output": "x.bin"}
        )
    names = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(names) == ["data", "format", "lerning_rate", "output", "rank", "steps"]


def test_an_unknown_key_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(SpecError, match=r"lerning_rate: unknown option. Did you mean 'learning_rate'\?"):
        parse_spec(TrainSpec, TRAIN | {"lerning_rate": 1})
    with pytest.raises(SpecError, match=r"rnak: unknown option. Did you mean 'rank'\?"):
        parse_spec(TrainSpec, TRAIN | {"options": {"rnak": 1}})


def test_an_unknown_method_is_one_problem_and_its_options_none() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(TrainSpec, TRAIN | {"method": "lroa", "rank": 4, "steps": 0})
    assert len(caught.value.problems) == 2
    assert "method: unknown training method 'lroa'. Did you mean 'lora'?" in str(caught.value)


def test_a_spec_made_in_python_checks_its_method_and_options_too() -> None:
    with pytest.raises(ValidationError, match="unknown training method"):
        TrainSpec.model_validate(TRAIN | {"method": "nothing"})
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TrainSpec.model_validate(TRAIN | {"rank": 0})


def test_options_read_the_same_flat_and_nested_and_flat_wins() -> None:
    flat = parse_spec(TrainSpec, TRAIN | {"rank": 4})
    assert flat == parse_spec(TrainSpec, TRAIN | {"options": {"rank": 4}})
    assert flat == parse_spec(TrainSpec, TRAIN | {"rank": 4, "options": {"rank": 16}})
    assert flat != parse_spec(TrainSpec, TRAIN | {"rank": 5})


def test_hyphens_read_like_underscores() -> None:
    spec = parse_spec(TrainSpec, TRAIN | {"batch-size": 3, "train-text-encoder": True})
    assert (spec.batch_size, spec.options.model_dump()["train_text_encoder"]) == (3, True)


def test_the_word_none_turns_a_number_off_but_stays_a_word_in_a_text() -> None:
    spec = parse_spec(TrainSpec, TRAIN | {"min_snr_gamma": "none", "alpha": "none", "prompt": "none"})
    assert spec.min_snr_gamma is None
    assert spec.options.model_dump()["alpha"] is None
    assert spec.prompt == "none"


@pytest.mark.parametrize(
    ("spec_type", "given"),
    [
        (TrainSpec, TRAIN | {"rank": 3, "targets": "all", "sample_prompts": ["a", "b"]}),
        (
            GenerateSpec,
            {"prompt": "x", "adapters": ["a.safetensors:0.5"], "method": "switch", "switch_every": 2},
        ),
    ],
    ids=["train", "generate"],
)
def test_a_spec_survives_json_with_the_options_of_its_method(spec_type, given) -> None:
    spec = parse_spec(spec_type, given)
    assert parse_spec(spec_type, json.loads(spec.model_dump_json())) == spec


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("dog.safetensors:-1", "dog.safetensors", -1.0),
        ("C:\\dog.safetensors", "C:\\dog.safetensors", 1.0),
        ("12", "12", 1.0),
    ],
)
def test_an_adapter_is_a_path_and_perhaps_a_weight(text: str, path: str, weight: float) -> None:
    use = AdapterUse.parse(text)
    assert (str(use.path), use.weight) == (path, weight)


@pytest.mark.parametrize("weight", ["99", "nan", "inf"])
def test_a_weight_out_of_range_is_refused_and_no_part_of_the_path(weight: str) -> None:
    with pytest.raises(SpecError, match="weight"):
        parse_spec(GenerateSpec, {"prompt": "x", "adapters": f"dog.safetensors:{weight}"})


def test_the_names_a_user_may_set_include_the_options_of_the_method() -> None:
    assert {"steps", "rank", "targets"} <= set(known_fields(TrainSpec))
    assert "switch_every" in known_fields(GenerateSpec, "switch")
    assert "switch_every" not in known_fields(GenerateSpec)
    assert "options" not in known_fields(GenerateSpec)


def test_every_field_says_what_it_does() -> None:
    for spec_type in (TrainSpec, GenerateSpec):
        for name, field in spec_type.model_fields.items():
            assert field.description or name == "options", name
        for method in spec_type.registry.names():
            for name, field in spec_type.registry[method].Options.model_fields.items():
                assert field.description, f"{method}.{name}"
