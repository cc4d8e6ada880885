"""A plan is shown as a table and a picture: most without a base, the others say how to go on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import studio
from studio import bases
from studio.bases import known_fingerprint
from studio.composing.planning import load_adapters, weights_of
from studio.composing.timeline import Timeline
from studio.errors import AdapterError, BaseNeeded, CompositionError, OutputError, UsageError
from studio.plots import COLORS
from studio.specs import Event
from studio.specs.composing import PlanSpec, ProfileSpec

NOWHERE = {"base": "no/such/base"}
ROLES = {"fox": "high", "ink": "low"}


@pytest.fixture
def shown(composition: Callable[..., dict[str, Any]]) -> Callable[..., Timeline]:
    """Return a function: changes of a plan's request -> what is shown."""
    return lambda **values: studio.show_plan(PlanSpec.model_validate(composition(**values)))


def test_a_plan_is_a_table_of_weights_and_evaluations_and_needs_no_base(
    shown: Callable[..., Timeline],
) -> None:
    found = shown(**NOWHERE, method="switch", options={"switch_every": 2}, steps=16)
    first = [0.8, 0.8, 0.0, 0.0] * 4
    assert [(lane.name, list(lane.conditional)) for lane in found.lanes] == [
        ("fox", first),
        ("ink", [0.0 if weight else 0.5 for weight in first]),
    ]
    lines = found.lines()
    assert lines[0].split() == ["step", *(str(step) for step in range(1, 16))]
    assert lines[1].split() == ["fox", *(f"{weight:.2f}" for weight in first[:15])]
    assert lines[3].split() == ["rows", *["2"] * 15]
    assert lines[5].split() == ["step", "16"] and lines[6].split() == ["fox", "0.00"]
    assert lines[-1] == "evaluations: 1.00 x the base's"


def test_rows_that_take_kept_features_and_rows_without_a_branch_are_counted(
    shown: Callable[..., Timeline],
) -> None:
    found = shown(
        **NOWHERE,
        method="composite",
        options={"shared_unconditional": True},
        modifiers={
            "cache": {"interval": 2, "full_first": 1, "full_last": 1},
            "skip-guidance": {"start": 0.75},
        },
        steps=8,
    )
    # Two adapters and the base for the unconditional rows; from step 7 on the adapters alone.
    assert [each.full + each.shallow for each in found.passes] == [3] * 6 + [2] * 2
    assert [each.shallow for each in found.passes] == [0, 3, 0, 3, 0, 3, 0, 0]
    assert found.lines()[-1] == "evaluations: 1.38 x the base's, 41% of it with cached deep features"
    lane = found.lanes[0]
    assert lane.conditional == (0.4,) * 8 and lane.unconditional == (0.0,) * 6 + (None,) * 2
    (line,) = (line for line in found.lines() if line.startswith("fox, unconditional"))
    assert line.split()[2:] == ["0.00"] * 6 + ["-"] * 2


def test_layers_switch_where_the_plan_of_klora_says(
    shown: Callable[..., Timeline], composition: Callable[..., dict[str, Any]], short_sd: Callable[[], Any]
) -> None:
    found = shown(method="klora", steps=20)
    spec = PlanSpec.model_validate(composition(method="klora"))
    pipe = short_sd()
    live = studio.compose(pipe, load_adapters(spec, pipe), method="klora", weights=weights_of(spec))
    points: Any = live.plan
    assert {lane.name for lane in found.layers} == set(points.switching_points)
    for lane in found.layers:
        turns = points.switching_points[lane.name]
        for step in range(20):
            # At the very point itself the content still acts.
            acting = [name for start, name in turns if not start or start < step / 20][-1]
            rests = {name: row[step] for name, row in lane.weights.items() if name != acting}
            assert lane.weights[acting][step] == {"fox": 0.8, "ink": 0.5}[acting]
            assert not any(rests.values())
    kinds = [lane.name.split(".")[1] for lane in found.layers]
    assert kinds == sorted(kinds, key=["down_blocks", "mid_block", "up_blocks"].index)


def test_the_picture_shows_which_adapter_acts_when(shown: Callable[..., Timeline], tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.png"
    shown(**NOWHERE, method="switch", options={"switch_every": 1}, steps=4, picture=path)
    colors = [tuple(int(color[place : place + 2], 16) for place in (1, 3, 5)) for color in COLORS[:2]]
    with Image.open(path) as image:
        picture = image.convert("RGB")
    columns: dict[Any, set[int]] = {color: set() for color in colors}
    for x in range(picture.width):
        for y in range(picture.height):
            if (pixel := picture.getpixel((x, y))) in columns:
                columns[pixel].add(x)
    fox, ink = (columns[color] for color in colors)
    assert fox and ink and not fox & ink
    # Fox, ink, fox, ink from left to right, each about as wide.
    runs = [[x for x in range(picture.width) if x in own] for own in (fox, ink)]
    assert runs[0][0] < runs[1][0] < runs[0][-1] < runs[1][-1]
    assert len(fox) == pytest.approx(len(ink), abs=4) and len(fox) > 300
    with pytest.raises(OutputError, match=r"plan\.png' exists\. Choose another name or give --overwrite"):
        shown(**NOWHERE, picture=path)


def test_a_plan_that_measures_adapters_says_what_measures_them_and_finds_it_without_the_base(
    shown: Callable[..., Timeline], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases._BASES.clear()
    with pytest.raises(
        BaseNeeded, match=r"'fox', 'ink' bring in .*'studio compose --profile' .*--measure loads"
    ):
        shown(method="cmlora")
    with_roles = shown(**NOWHERE, method="cmlora", options={"roles": ROLES})
    assert [lane.name for lane in with_roles.lanes] == ["fox", "ink"]
    measured = shown(method="cmlora", measure=True, steps=8)

    def again(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr("studio.composition.profiles._Meter._measured", again)
    bases._BASES.clear()
    monkeypatch.setattr(bases, "load_base", again)
    assert shown(method="cmlora", steps=8) == measured
    # A document knows its base's hash, wherever that lies.
    copied = str(shutil.copytree(base, tmp_path / "copied"))
    expected = {copied: str(known_fingerprint(base, "auto", "auto"))}
    assert shown(base=copied, method="cmlora", steps=8, expected_hashes=expected) == measured
    with pytest.raises(BaseNeeded, match="not done yet"):
        shown(base=copied, method="cmlora")
    os.utime(Path(base, "unet", "config.json"), (0, 0))
    with pytest.raises(BaseNeeded, match="not done yet"):
        shown(method="cmlora")


def test_profiles_tell_the_roles_that_cmlora_gives(
    composition: Callable[..., dict[str, Any]], short_sd: Callable[[], Any]
) -> None:
    from studio.composing.profile import measure_profiles
    from studio.composition.profiles import Measurement, Profile

    assert studio.profile is __import__("studio.composition.profiles", fromlist=["profile"]).profile
    fields = {name: value for name, value in composition().items() if name in ProfileSpec.model_fields}
    report = measure_profiles(ProfileSpec.model_validate(fields))
    pipe = short_sd()
    known = studio.profile(
        pipe, load_adapters(ProfileSpec.model_validate(fields), pipe), measurement=Measurement()
    )
    assert report.profiles == known
    scores = [found.score for found in report.profiles.values()]
    assert scores == sorted(scores, reverse=True)
    lines = type(report)({"fox": Profile((0.5,)), "ink": Profile((-0.25,))}).lines()
    assert lines == [
        "fox  +0.5000  high: leads early",
        "ink  -0.2500  low: leads late",
        "--method cmlora --roles fox=high --roles ink=low",
    ]


def test_a_plan_that_reads_the_prompt_loads_the_base_only_with_one(
    composition: Callable[..., dict[str, Any]],
) -> None:
    def heard(**values: Any) -> tuple[Timeline, list[str]]:
        events: list[Event] = []
        options = {"triggers": {"fox": "fox", "ink": "in ink"}, "switch_every": 4, "final_steps": 1}
        spec = PlanSpec.model_validate(composition(method="w-switch", options=options, steps=20, **values))
        return studio.show_plan(spec, on_event=events.append), [event.message for event in events]

    without, said = heard(base="no/such/base")
    assert said == ["the plan depends on the prompt; this is the one without. Give --prompt."]
    within, said = heard(prompt="a fox by the sea in ink")
    assert said == [] and within.lanes != without.lanes
    # A prompt that nobody reads loads nothing.
    studio.show_plan(PlanSpec.model_validate(composition(**NOWHERE, prompt="a fox")))


def test_what_cannot_be_planned_is_said(shown: Callable[..., Timeline], duo: Path, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"switch_every=5 in a run of 5 steps lets only 'fox' act"):
        shown(**NOWHERE, method="switch", steps=5)
    clora = {"concepts": {"fox": "fox", "ink": "ink"}, "triggers": {"fox": "sks", "ink": "tok"}}
    with pytest.raises(CompositionError, match=r"which is not known. Give it \(--prompt\)"):
        shown(**NOWHERE, method="clora", options=clora)
    with pytest.raises(UsageError, match=r"picture: must be a file name that ends in \.png"):
        studio.specs.parse_spec(PlanSpec, {"picture": "plan.jpg"})  # type: ignore[attr-defined]
    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange

    uses = []
    for name, width in (("one", 768), ("two", 2048)):
        key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        change = LoraChange.sample((1280, width), generator=torch.Generator().manual_seed(0))
        studio.save_adapter(Adapter(name, "lora", {key: change}), tmp_path / f"{name}.safetensors")
        uses.append({"path": str(tmp_path / f"{name}.safetensors")})
    with pytest.raises(AdapterError, match=r"'one' for SD 1\.5, 'two' for SDXL\. Choose adapters for one"):
        shown(**NOWHERE, adapters=uses)
