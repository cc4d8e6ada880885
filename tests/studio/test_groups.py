"""Fields stand under headings: each once, and those that nobody put anywhere last."""

from collections import Counter
from itertools import chain

import pytest
from pydantic import Field

from studio.flags import Parser, add_fields
from studio.specs import GenerateSpec, ProbeSpec, TrainSpec
from studio.specs.groups import OTHERS, TRAINING, grouped


class Wider(TrainSpec):
    """A training specification with one more field."""

    shade: int = Field(3, description="Of a new kind.")


@pytest.mark.parametrize("model", [TrainSpec, GenerateSpec, ProbeSpec, Wider])
def test_every_field_stands_under_one_heading(model: type[TrainSpec]) -> None:
    found = Counter(chain.from_iterable(grouped(model).values()))
    assert found == Counter(set(model.model_fields) - {"options"})


def test_the_headings_of_training_name_its_fields_only() -> None:
    named = Counter(chain.from_iterable(TRAINING.values()))
    assert set(named) <= set(TrainSpec.model_fields) and set(named.values()) == {1}


def test_a_field_that_is_named_nowhere_stands_last() -> None:
    heading, names = list(grouped(Wider).items())[-1]
    assert heading == OTHERS and names[-1] == "shade"


def test_a_model_without_headings_has_one() -> None:
    assert list(grouped(ProbeSpec)) == ["options"]


def test_the_help_text_follows_the_headings_and_the_options_of_the_method_come_second() -> None:
    parser = Parser(prog="studio")
    add_fields(parser, Wider, "sara")
    lines = parser.format_help().splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    first, *others = grouped(Wider)
    assert headings == ["options", first, "options of the training method 'sara'", *others]
    places = {line.split()[0]: number for number, line in enumerate(lines) if line.startswith("  --")}
    assert lines.index("run:") < places["--steps"] < places["--quantile"] < places["--trigger"]
    assert lines.index(f"{OTHERS}:") < places["--shade"]
