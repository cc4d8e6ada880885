import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, Field

from studio.errors import SpecError, UsageError
from studio.flags import Parser, read_spec_arguments
from studio.specs import GenerateSpec, Options, TrainSpec

NEEDED = ["--data", "pictures", "--output", "x.safetensors"]


def read(spec_type: Any, *argv: str, given: Any = None) -> Any:
    return read_spec_arguments(Parser(prog="studio"), spec_type, argv, given=given)[0]


def test_each_flag_sets_its_field() -> None:
    spec = read(TrainSpec, *NEEDED, "--steps", "7", "--learning-rate", "0.5", "--flip", "--no-center-crop")
    assert (spec.steps, spec.learning_rate, spec.flip, spec.center_crop) == (7, 0.5, True, False)
    assert spec.data == Path("pictures")


def test_underscores_and_an_equals_sign_are_as_good_as_hyphens() -> None:
    spec = read(TrainSpec, *NEEDED, "--batch_size=3", "--train_text_encoder", "--no-center_crop")
    assert (spec.batch_size, spec.options.train_text_encoder, spec.center_crop) == (3, True, False)


def test_a_value_keeps_its_underscores() -> None:
    assert read(TrainSpec, *NEEDED, "--prompt", "my_dog").prompt == "my_dog"
    assert read(TrainSpec, *NEEDED, "--prompt=my_dog").prompt == "my_dog"


def test_a_flag_for_several_values_is_repeated_in_singular_or_plural() -> None:
    spec = read(
        GenerateSpec, "--prompt", "x", "--adapter", "a.safetensors:0.5", "--adapters", "b.safetensors"
    )
    assert [(use.path.name, use.weight) for use in spec.adapters] == [
        ("a.safetensors", 0.5),
        ("b.safetensors", 1),
    ]


def test_the_options_of_the_chosen_method_are_flags_and_those_of_others_are_not() -> None:
    spec = read(GenerateSpec, "--prompt", "x", "--method", "switch", "--switch-every", "3")
    assert spec.options.switch_every == 3
    with pytest.raises(SpecError, match="--switch-every: is an option of other methods: switch"):
        read(GenerateSpec, "--prompt", "x", "--switch-every", "3")


def test_toml_fills_in_and_flags_win(tmp_path: Path) -> None:
    config = tmp_path / "dog.toml"
    config.write_text('data = "a"\noutput = "x.safetensors"\nsteps = 5\nbatch-size = 3\nrank = 4\n')
    spec = read(TrainSpec, "--config", str(config), "--rank", "8", "--data", "b")
    assert (spec.data.name, spec.steps, spec.batch_size, spec.options.rank) == ("b", 5, 3, 8)


def test_a_flag_wins_over_the_options_table_and_the_file_may_choose_the_method(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text('prompt = "x"\nmethod = "switch"\n[options]\nswitch_every = 2\n')
    assert read(GenerateSpec, "--config", str(config)).options.switch_every == 2
    assert read(GenerateSpec, "--config", str(config), "--switch-every", "9").options.switch_every == 9


def test_problems_of_flags_and_file_are_reported_together(tmp_path: Path) -> None:
    config = tmp_path / "dog.toml"
    config.write_text("steps = 0\nrnak = 3\n")
    with pytest.raises(SpecError) as caught:
        read(TrainSpec, "--config", str(config), "--bach-size", "2", "--rank", "many")
    text = str(caught.value)
    assert "--bach-size: unknown option. Did you mean '--batch-size'?" in text
    assert "rnak: unknown option. Did you mean 'rank'?" in text
    assert "steps: " in text and "rank: " in text and "data: is required" in text


@pytest.mark.parametrize(
    ("text", "message"), [("a = [", "not valid TOML"), (None, "cannot read the config file")]
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    config = tmp_path / "dog.toml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read(TrainSpec, "--config", str(config))
    assert "dog.toml" in str(caught.value)


def test_abbreviations_and_stray_words_are_refused() -> None:
    with pytest.raises(SpecError, match=r"--step: unknown option\. Did you mean '--steps'"):
        read(TrainSpec, *NEEDED, "--step", "3")
    with pytest.raises(SpecError, match="stray: unexpected argument"):
        read(TrainSpec, *NEEDED, "stray")


def test_a_flag_without_its_value_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--steps: expected one argument"):
        read(TrainSpec, *NEEDED, "--steps")


def test_values_of_a_picture_are_below_the_flags_and_lose_options_of_another_method() -> None:
    given = {"prompt": "x", "seed": 5, "method": "switch", "options": {"switch_every": 3}}
    assert read(GenerateSpec, given=given).options.switch_every == 3
    spec = read(GenerateSpec, "--seed", "6", "--method", "merge", given=given)
    assert (spec.prompt, spec.seed, spec.method) == ("x", 6, "merge")


def test_help_shows_descriptions_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(TrainSpec, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Optimizer steps. [300]" in text
    assert "--schedule {constant,cosine,restarts,linear,polynomial}" in text
    assert "options of the training method 'lora'" in text
    for name in (*TrainSpec.model_fields, "rank"):
        assert name == "options" or "--" + name.replace("_", "-") in text


def test_a_mapping_is_given_as_pairs() -> None:
    class Weighted(BaseModel):
        model_config: ClassVar = Options.model_config
        method: str = "none"
        parts: dict[str, float] = Field(default_factory=dict, description="Weight by part.")

    assert read(Weighted, "--parts", "a=1", "--parts", "b=0.5").parts == {"a": 1, "b": 0.5}
    with pytest.raises(UsageError, match="'a' must be KEY=VALUE"):
        read(Weighted, "--parts", "a")


def test_a_path_in_the_users_home_is_found_from_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dog.toml").write_text('data = "~/pics"\noutput = "~/dog.safetensors"\nprompt = "~/x"\n')
    spec = read(TrainSpec, "--config", str(tmp_path / "dog.toml"))
    assert (spec.data, spec.output) == (tmp_path / "pics", tmp_path / "dog.safetensors")
    assert spec.prompt == "~/x"


def test_a_text_where_a_list_is_wanted_is_said(tmp_path: Path) -> None:
    (tmp_path / "dog.toml").write_text('sample_prompts = "a cat"\n')
    with pytest.raises(SpecError, match=r'sample_prompts: must be a list, as in \["a", "b"\], got \'a cat\''):
        read(TrainSpec, "--config", str(tmp_path / "dog.toml"))
