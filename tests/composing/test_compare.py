"""Methods are compared on the same pictures; what each costs stands under it, and who cannot says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import studio
from studio.composing.compare import CompareReport
from studio.errors import OutputError, SpecError
from studio.plots import LINE, text_width
from studio.specs import Event, GenerateSpec, parse_spec
from studio.specs.composing import CompareSpec

METHODS = ("merge", "switch", "composite", "cmlora", "sine")
SHARED: dict[str, Any] = {"prompt": "a fox", "steps": 6, "guidance_scale": 3.0, "batch_size": 2}
OPTIONS: dict[str, Any] = {
    "switch": {"switch_every": 2},
    "cmlora": {"roles": {"fox": "high", "ink": "low"}, "text_encoder_policy": "base"},
}


@pytest.fixture(scope="module")
def compared(
    composition: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompareReport, list[Event]]:
    """Return the report of a comparison with two seeds, and what was told on the way."""
    events: list[Event] = []
    grid = tmp_path_factory.mktemp("compared") / "grid.png"
    fields = composition(methods=METHODS, method_options=OPTIONS, seeds="3,5", grid=grid, **SHARED)
    report = studio.compare(CompareSpec.model_validate(fields), on_event=events.append)
    return report, events


def test_each_method_says_its_time_and_evaluations(compared: tuple[CompareReport, list[Event]]) -> None:
    report, events = compared
    assert [row.method for row in report.rows] == ["base", *METHODS]
    rows = {row.method: row for row in report.rows}
    whole = {name: rows[name].evaluations for name in ("base", "merge", "switch", "composite")}
    assert whole == {"base": 1, "merge": 1, "switch": 1, "composite": 2}
    assert all(row.seconds > 0 and not row.refusal for row in report.rows[:5])
    # Steps 1, 3, 5 and 6 of six are whole, but where one leads the other takes what is kept.
    cached = rows["cmlora"]
    assert cached.evaluations == 2 and 0 < cached.cached < 1 and 1 < cached.operations < 2
    assert f"{cached.cached:.0%} of them cached: {cached.operations:.2f} x its operations" in cached.note()
    progress = [event for event in events if event.kind == "progress"]
    assert progress[-1].step == progress[-1].total == 6 * 2 * 6
    assert [event.step for event in progress] == sorted(event.step for event in progress)


def test_a_method_that_cannot_take_these_adapters_is_said_and_the_others_go_on(
    compared: tuple[CompareReport, list[Event]],
) -> None:
    row = compared[0].rows[-1]
    assert row.method == "sine" and row.seconds == 0
    assert "trigger words of 'fox' are not known" in row.refusal and row.note() == f"refused: {row.refusal}"
    assert compared[0].lines()[-1] == f"sine       refused: {row.refusal}"


def test_the_numbers_are_in_a_file_that_names_what_they_are_of(
    compared: tuple[CompareReport, list[Event]], base: str, duo: Path
) -> None:
    report, _ = compared
    document = json.loads(report.table.read_text(encoding="utf-8"))
    assert report.table == report.grid.with_suffix(".json")
    assert [row["method"] for row in document["rows"]] == ["base", *METHODS]
    assert document["rows"][3]["evaluations"] == 2
    assert document["spec"]["seeds"] == [3, 5] and document["spec"]["base"] == base
    assert list(document["facts"]["adapter_hashes"]) == ["fox", "ink"] and document["facts"]["model_hash"]
    # What is in the file asks for the same again.
    assert parse_spec(CompareSpec, document["spec"]).methods == METHODS


def test_the_grid_holds_the_pictures_that_generate_draws(
    compared: tuple[CompareReport, list[Event]], composition: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with Image.open(compared[0].grid) as image:
        grid = image.convert("RGB")
    fields = composition(method="switch", options=OPTIONS["switch"], seed=5, output=tmp_path, **SHARED)
    (result,) = studio.generate(parse_spec(GenerateSpec, {**fields, "batch_size": 1}))
    tile = np.asarray(ImageOps.contain(result.image, (128, 128), Image.Resampling.LANCZOS), float)
    left, wide, high = text_width(["base", *METHODS]), 128 + 8, 128 + 4 + LINE
    place = (left + wide, LINE + 2 * high)
    drawn = np.asarray(grid.crop((*place, place[0] + 128, place[1] + 128)), float)
    # Two at once are computed in another order than one: a level of 255 here and there.
    assert np.abs(tile - drawn).max() <= 2
    other = np.asarray(grid.crop((left, place[1], left + 128, place[1] + 128)), float)
    assert np.abs(tile - other).max() > 20


def test_a_comparison_that_is_stopped_writes_what_it_has(
    composition: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    steps: list[int] = []
    messages: list[str] = []

    def told(event: Event) -> None:
        if event.kind == "progress":
            steps.append(event.step)
        messages.append(event.message)

    fields = composition(methods="merge,switch", prompt="a fox", steps=2, grid=tmp_path / "grid.png")
    report = studio.compare(
        CompareSpec.model_validate(fields), on_event=told, stop=lambda: bool(steps) and steps[-1] >= 3
    )
    assert [row.method for row in report.rows] == ["base"]
    assert "stopped before 'merge' was done" in messages
    assert report.grid.is_file() and len(json.loads(report.table.read_text())["rows"]) == 1


def test_a_comparison_that_cannot_be_written_or_names_nothing_is_refused(
    composition: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "grid.json").write_text("kept")
    given = composition(methods="merge", prompt="a fox", grid=tmp_path / "grid.png")
    with pytest.raises(OutputError, match=r"grid\.json' exists"):
        studio.compare(parse_spec(CompareSpec, given))
    with pytest.raises(SpecError) as caught:
        parse_spec(CompareSpec, {**given, "methods": "merge, swich", "seeds": "4-1", "grid": "grid.jpg"})
    text = str(caught.value)
    assert "methods: unknown composition method 'swich'. Did you mean 'switch'?" in text
    assert "seeds: '4-1' is no seed and no range of seeds" in text
    assert "grid: must be a file name that ends in .png" in text
