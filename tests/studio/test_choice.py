"""Plan modifiers and options of methods in one text, in TOML and in Python."""

from pathlib import Path
from typing import Any

import pytest

from studio.errors import SpecError
from studio.flags import Parser, read_spec_arguments
from studio.specs import GenerateSpec, parse_spec
from studio.specs.batch import read_seeds
from studio.specs.choice import read_choice


def dumped(given: Any) -> Any:
    spec = parse_spec(GenerateSpec, {"prompt": "x", "modifiers": given})
    return {name: options.model_dump(exclude_unset=True) for name, options in spec.modifiers.items()}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("cache", {}),
        ("cache:interval=3,full-first=2", {"interval": 3, "full_first": 2}),
        ("pin:adapters=safety", {"adapters": ("safety",)}),
        ("pin:adapters=safety, anatomy", {"adapters": ("safety", "anatomy")}),
        ("decor:words=house, tree,strength=0.5", {"words": "house, tree", "strength": 0.5}),
        (
            "schedule:weights.fox=0.5,weights.ink.v2=0@0, 1@0.3",
            {"weights": {"fox": 0.5, "ink.v2": "0@0 1@0.3"}},
        ),
        (
            "blocks:weights.fox=up_blocks.1:0.5,MID:0@0 1@1",
            {"weights": {"fox": "up_blocks.1:0.5, MID:0@0 1@1"}},
        ),
    ],
)
def test_a_text_says_the_options_of_a_modifier(text: str, options: Any) -> None:
    assert dumped([text]) == {read_choice(text)[0]: options}


def test_texts_of_one_modifier_add_up_and_their_order_is_kept() -> None:
    found = dumped(["schedule:weights.fox=1", "skip-guidance:start=0.5", "schedule:weights.ink=0.5"])
    assert found["schedule"] == {"weights": {"fox": 1, "ink": 0.5}}
    assert list(found) == ["schedule", "skip-guidance"]
    assert dumped("none") == {}


def test_every_wrong_modifier_and_option_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(SpecError) as caught:
        dumped({"cahce": {}, "cache": {"intervl": 2, "full_first": -1}, "pin": {}, "decor": 3})
    text = str(caught.value)
    assert "unknown plan modifier 'cahce'. Did you mean 'cache'?" in text
    assert "cache: intervl: unknown option. Did you mean 'interval'?" in text
    assert "cache: full_first: Input should be greater than or equal to 0, got -1" in text
    assert "pin: adapters: is required" in text and "options are a table, got 3" in text
    with pytest.raises(SpecError, match="'3' must be OPTION=VALUE"):
        dumped("cache:3")
    with pytest.raises(SpecError, match="weights has a value already"):
        dumped("schedule:weights=1,weights.fox=2")


def test_flags_toml_and_python_mean_the_same_and_flags_win(tmp_path: Path) -> None:
    def read(*argv: str) -> Any:
        return read_spec_arguments(Parser(), GenerateSpec, ["--prompt", "x", *argv])[0].modifiers

    config = tmp_path / "x.toml"
    config.write_text('[modifiers.skip-guidance]\nstart = 0.5\n[modifiers.pin]\nadapters = ["safety"]\n')
    python = {"skip_guidance": {"start": 0.5}, "pin": {"adapters": ["safety"]}}
    asked = parse_spec(GenerateSpec, {"prompt": "x", "modifiers": python}).modifiers
    assert read("--config", str(config)) == asked
    assert read("--with", "skip-guidance:start=0.5", "--with", "pin:adapters=safety") == asked
    assert list(read("--config", str(config), "--with", "cache:interval=2")) == ["cache"]
    assert read("--config", str(config), "--with", "none") == {}


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("1-4", [1, 2, 3, 4]), ("1, 5-6", [1, 5, 6]), (["2", "4-4"], [2, 4]), (7, [7]), ([1, 2], [1, 2])],
)
def test_seeds_are_ranges_and_lists(given: Any, seeds: list[int]) -> None:
    assert list(map(int, read_seeds(given))) == seeds


def test_a_range_of_seeds_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="no range of seeds"):
        read_seeds("4-1")
