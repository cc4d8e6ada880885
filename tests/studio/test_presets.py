"""Presets: each is a run that works, and says why."""

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import studio
from studio import cli
from studio.errors import UsageError
from studio.models import quantization
from studio.presets import preset, presets
from studio.specs import TrainSpec, parse_spec

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "presets"
TASKS, CARDS, OWN = ("subject", "style", "b-lora", "sara"), ("8gb", "12gb"), ("starter",)
NEEDED = {"data": "pictures", "output": "a.safetensors"}
# bitsandbytes quantises on any device, but keeps 8-bit moments on GPUs only.
ON_CPU = {"optimizer": "adamw"}


@pytest.fixture(scope="module")
def tiny_xl(tiny_sdxl: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny-xl"
    tiny_sdxl().save_pretrained(folder, safe_serialization=True)
    return str(folder)


def test_there_is_one_for_each_task_and_each_size_of_card() -> None:
    assert set(presets()) == {*TASKS, *CARDS, *OWN}
    for name, purpose in presets().items():
        assert purpose[0].isupper() and purpose[-1] == "." and len(purpose) <= 110, name


@pytest.mark.parametrize("name", [*TASKS, *CARDS])
def test_every_value_says_why_and_none_names_data(name: str) -> None:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    settings = [line for line in lines if re.match(r"\w+ = ", line)]
    uncommented = [line for line in settings if not re.search(r"  # \S", line)]
    assert len(settings) == len(preset(name)) and uncommented == []
    assert not preset(name).keys() & {"data", "output", "prompt", "trigger", "class_prompts", "base"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("card", CARDS)
def test_a_card_goes_below_every_task(card: str, task: str) -> None:
    spec = parse_spec(TrainSpec, {**preset(card, task), **NEEDED})
    assert spec.method == preset(task)["method"]
    assert (spec.precision, spec.gradient_checkpointing, spec.offload_encoders) == ("bf16", True, True)
    assert spec.batch_size == 1 and spec.cache == "memory" and spec.attention == "sdpa"


def test_settings_are_those_that_the_papers_and_trainers_give() -> None:
    def of(name: str) -> TrainSpec:
        return parse_spec(TrainSpec, {**preset(name), **NEEDED})

    assert preset("b-lora")["min_snr_gamma"] == "none" and of("b-lora").min_snr_gamma is None
    b_lora: Any = of("b-lora")
    assert (b_lora.options.rank, b_lora.unet_learning_rate, b_lora.steps) == (64, 5e-5, 1000)
    assert (b_lora.schedule, b_lora.batch_size) == ("constant", 1)
    sara: Any = of("sara")
    # 859.5 million parameters of SD 1.5, of which the paper trains 50 million.
    assert sara.options.quantile * 859.5e6 == pytest.approx(50e6, rel=0.04)
    assert sara.unet_learning_rate == pytest.approx(1e-3 * 2.718281828 ** (-350 * 0.002), rel=0.01)
    assert (sara.options.rank_weight, sara.steps, sara.schedule) == (5e-4, 5000, "cosine")
    for name in ("style", "sara"):
        assert of(name).batch_size * of(name).gradient_accumulation == 4
    for name in ("subject", "style"):
        assert of(name).options.alpha == of(name).options.rank  # type: ignore[attr-defined]
        assert of(name).warmup_steps == of(name).steps * 0.05
        assert not of(name).has_class_pictures


def test_the_smallest_card_asks_for_what_saves_most() -> None:
    asked = preset("8gb")
    assert (asked["optimizer"], asked["quantize_base"]) == ("adamw8bit", "nf4")
    assert asked.items() > preset("12gb").items()
    assert parse_spec(TrainSpec, {**preset("8gb", "sara"), **NEEDED}).optimizer == "adamw"


def test_what_the_smallest_card_needs_is_said(
    tmp_path: Path, tiny_base: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for package in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    given = {"base": tiny_base, "data": pictures, "prompt": "disc", "output": tmp_path / "a.safetensors"}
    given |= {"device": "cpu", "steps": 1}
    for plain in ({"optimizer": "adamw"}, {"quantize_base": "none"}):
        spec = TrainSpec(**preset("8gb", "subject") | given | plain)
        with pytest.raises(studio.StudioError, match=r"bitsandbytes|diffusion-studio\[gpu\]"):
            studio.train(spec)


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        pytest.param(
            ["8gb", "subject"],
            ON_CPU,
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="it quantises"),
        ),
        (["12gb", "style"], {"sample_every": 0, "gradient_accumulation": 2}),
        # The layers of the tiny base have 32 channels, less than the rank and than what the rank term takes.
        (["b-lora"], {"rank": 4, "alpha": 4, "sample_every": 0}),
        (["sara"], {"rank_weight": 0, "sample_every": 0, "gradient_accumulation": 2}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_every_preset_trains(
    tiny_base: str, tiny_xl: str, pictures: Path, tmp_path: Path, names: list[str], changed: dict[str, Any]
) -> None:
    base = tiny_xl if "b-lora" in names else tiny_base
    given = {"base": base, "data": pictures, "prompt": "disc", "output": tmp_path / "a.safetensors"}
    small = {"steps": 1, "sample_steps": 1, "device": "cpu"}
    result = studio.train(TrainSpec(**preset(*names) | given | small | changed))
    assert len(result.losses) == 1 and result.path.is_file()
    moved = [change for change in result.adapter.changes.values() if _moved(change)]
    assert len(moved) > 0.5 * len(result.adapter.changes)


def _moved(change: Any) -> bool:
    learned = change.values if hasattr(change, "values") else change.up
    return bool(learned.any())


def test_flags_win_over_the_config_which_wins_over_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specs: list[TrainSpec] = []

    def keep(spec: TrainSpec, **_: Any) -> Any:
        specs.append(spec)
        raise UsageError("enough")

    monkeypatch.setattr("studio.api.train", keep)
    (tmp_path / "dog.toml").write_text("steps = 7\nseed = 3\n")
    words = ["train", "--data", "a", "--output", "a.safetensors", "--config", str(tmp_path / "dog.toml")]
    cli.main([*words, "--preset", "12gb", "--preset=style", "--seed", "4"])
    (spec,) = specs
    assert (spec.steps, spec.seed, spec.options.rank, spec.precision) == (7, 4, 32, "bf16")  # type: ignore[attr-defined]
    # Another method takes of the preset what it knows.
    cli.main([*words, "--preset", "style", "--method", "dora"])
    cli.main([*words, "--preset", "style", "--method", "oft"])
    assert specs[1].options.rank == 32 and specs[1].method == "dora"  # type: ignore[attr-defined]
    assert specs[2].learning_rate == 1e-4 and specs[2].options.targets == "attention+ff"  # type: ignore[attr-defined]


def test_unknown_presets_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--preset", "subjct", "--data", "a", "--output", "a.safetensors"]) == 2
    known = "12gb, 8gb, b-lora, sara, starter, style, subject"
    text = f"unknown preset 'subjct'. Did you mean 'subject'? Known: {known}."
    assert text in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"unknown preset '\.\./starter/x'"):
        studio.preset("../starter/x")


@pytest.mark.parametrize("first", TASKS)
@pytest.mark.parametrize("last", TASKS)
def test_of_presets_of_two_methods_the_later_wins(first: str, last: str) -> None:
    spec = parse_spec(TrainSpec, {**preset(first, last), **NEEDED})
    alone = parse_spec(TrainSpec, {**preset(last), **NEEDED})
    assert (spec.method, spec.learning_rate, spec.options) == (
        alone.method,
        alone.learning_rate,
        alone.options,
    )


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 1e-4),
        (["--optimizer", "adamw8bit"], 1e-4),
        (["--optimizer", "prodigy"], 1.0),
        (["--method", "textual-inversion", "--token", "sks"], 5e-3),
        (["--method", "sara", "--learning-rate", "2e-4"], 2e-4),
    ],
)
def test_a_presets_learning_rate_is_for_what_it_was_made_for(
    words: list[str], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def keep(spec: TrainSpec, **_: Any) -> Any:
        rates.append(spec.unet_learning_rate)
        raise UsageError("enough")

    monkeypatch.setattr("studio.api.train", keep)
    cli.main(["train", "--data", "a", "--output", "a.safetensors", "--preset", "subject", *words])
    assert rates == [rate]


def test_a_method_that_does_not_exist_is_refused_beside_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "a", "--output", "a.safetensors", "--preset", "subject", "--method", "lroa"]
    assert cli.main(words) == 2 and "Did you mean 'lora'" in capsys.readouterr().err


def test_list_shows_them_alone_or_with_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "presets"]) == 0
    alone = capsys.readouterr().out
    assert [line.split()[0] for line in alone.splitlines()[1:]] == sorted(presets())
    assert "  subject            A person, animal or thing, from 5 to 20 pictures (LoRA; SD 1.5" in alone
    assert cli.main(["list"]) == 0
    assert alone in capsys.readouterr().out
    assert cli.main(["list", "present"]) == 2
    assert "invalid choice: 'present'" in capsys.readouterr().err
