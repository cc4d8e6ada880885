"""What the Train tab fills in: for the demo, for another base or method, and of presets."""

from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from studio.jobs import JobStore
from studio.presets import preset, presets
from studio.registry import TRAINERS
from studio.specs import TrainSpec, parse_spec
from studio.ui.follow import Follower
from studio.ui.train_start import DEMO, START
from studio.ui.train_tab import TrainTab
from studio.workspace import workspace


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> TrainTab:
    space = workspace(tmp_path_factory.mktemp("home"))
    tab = TrainTab(space, Follower(JobStore(space.database)), lambda: "")
    with gr.Blocks():
        tab.layout()
    return tab


def filled(tab: TrainTab, *choices: list[str], **typed: Any) -> dict[str, Any]:
    """Return the request of the form after presets were chosen one after the other."""
    shown = [typed.get(field.name, field.component.value) for field in tab.form.fields]
    for names in choices:
        updates = tab.fill(names, "starter")[3:]
        shown = [update.get("value", value) for update, value in zip(updates, shown, strict=True)]
    return tab.form.read(shown)


@pytest.mark.parametrize("names", [[name] for name in presets()] + [["8gb", "subject"]], ids="-".join)
def test_a_chosen_preset_stands_in_the_form(tab: TrainTab, names: list[str]) -> None:
    request = {**filled(tab, names), "data": "a", "output": Path("a.safetensors")}
    start = {} if "method" in preset(*names) else START | DEMO
    wanted = parse_spec(TrainSpec, {**start, **preset(*names), "data": "a", "output": "a.safetensors"})
    spec = parse_spec(TrainSpec, request)
    for name in preset(*names):
        holder = spec if name in TrainSpec.model_fields else spec.options
        source = wanted if name in TrainSpec.model_fields else wanted.options
        assert getattr(holder, name) == getattr(source, name), name


def test_another_choice_leaves_nothing_of_the_first_and_all_that_was_typed(tab: TrainTab) -> None:
    typed = {"prompt": "a photo of my cat", "seed": 9}
    once = filled(tab, ["subject"], **typed)
    assert once == filled(tab, ["b-lora"], ["8gb", "style"], ["subject"], **typed)
    assert (once["prompt"], once["seed"], once["rank"]) == ("a photo of my cat", 9, 16)
    assert filled(tab, ["style"], []) == filled(tab)


def test_presets_that_do_not_go_together_change_nothing_and_say_so(tab: TrainTab) -> None:
    choice, message, *fields = tab.fill(["sara", "8gb"], "starter")
    assert "quantize_base" in message
    assert all("value" not in update for update in (choice, *fields))


def test_the_choice_says_what_each_is_for(tab: TrainTab) -> None:
    assert [value for _, value in tab.presets.choices] == list(presets())
    assert tab.fill(["8gb", "style"], "starter")[0]["info"] == f"{presets()['8gb']} {presets()['style']}"


def test_the_page_opens_with_the_starters_preset(tab: TrainTab) -> None:
    needed = {"data": "a", "output": "a.safetensors"}
    spec = parse_spec(TrainSpec, filled(tab) | needed)
    assert spec == parse_spec(TrainSpec, {**START, **preset("starter"), "base": "starter", **needed})


def settled(tab: TrainTab, base: str, method: str, before: str, shown: list[Any]) -> list[Any]:
    """Return what stands in the demo's fields after another base or method was chosen."""
    _, *updates = tab.settle(base, method, before, *shown)
    return [update.get("value", value) for update, value in zip(updates, shown, strict=True)]


@pytest.mark.parametrize("method", sorted(TRAINERS))
def test_what_the_demo_trains_with_is_for_no_other_base_or_method(tab: TrainTab, method: str) -> None:
    given = {"data": "a", "output": "a.safetensors", "prompt": "a photo of sks robot", "sample_every": 50}
    fields = {field.name: field for field in tab.form.fields if field.method in (None, "lora")}
    opened = [fields[name].component.value for name in DEMO]
    for base in ("starter", "my/sdxl"):
        if (base, method) == ("starter", "lora"):
            continue
        shown = settled(tab, base, method, "lora", opened)
        typed = dict(zip((fields[name].component for name in DEMO), shown, strict=True))
        chosen = {fields["base"].component: base, fields["method"].component: method} | typed
        values = [chosen.get(field.component, field.component.value) for field in tab.form.fields]
        plain = given | {"base": base, "method": method, "checkpoint_every": 100}
        assert parse_spec(TrainSpec, tab.form.read(values) | given) == parse_spec(TrainSpec, plain)
        assert settled(tab, "starter", "lora", method, shown) == opened


def test_typed_values_stay_but_a_rate_for_a_method_with_another_one_of_its_own(tab: TrainTab) -> None:
    names = list(DEMO)
    typed = ["typed"] * len(names)
    rate = names.index("learning_rate")
    assert settled(tab, "my/sdxl", "dora", "lora", typed) == typed
    now = settled(tab, "my/sdxl", "full", "dora", typed)
    assert now[rate] == "" and now[:rate] + now[rate + 1 :] == typed[1:]
    assert tab.fill(["b-lora"], "my/sdxl")[2] == "b-lora", "whose rate the preset gives"


def test_presets_without_a_rate_leave_it_to_the_method_but_for_the_demo(tab: TrainTab) -> None:
    names = [field.name for field in tab.form.fields]
    rate = names.index("learning_rate") + 3
    assert tab.fill(["8gb"], "my/sdxl")[rate]["value"] == ""
    assert tab.fill(["8gb"], "starter")[rate]["value"] == "0.0025"
    assert tab.fill([], "my/sdxl")[rate]["value"] == ""


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({}, "0.001"),
        ({"method": "full"}, "1e-05"),
        ({"method": "vera", "optimizer": "lion"}, "0.001"),
        ({"method": "sara", "quantile": "", "threshold": "0.002"}, "0.000497"),
        ({"method": "b-lora", "rank": 0}, "5e-05"),
    ],
)
def test_an_empty_rate_says_what_it_stands_for(tab: TrainTab, choices: dict[str, Any], said: str) -> None:
    values = [choices.get(field.name, field.component.value) for field in tab.form.fields]
    assert tab.show_own_rate(*values)["placeholder"] == f"auto: {said}"
