"""Presets fill the form of the Train tab."""

from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from studio.jobs import JobStore
from studio.presets import preset, presets
from studio.specs import TrainSpec, parse_spec
from studio.ui.follow import Follower
from studio.ui.train_tab import START, TrainTab
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
        updates = tab.fill(names)[2:]
        shown = [update.get("value", value) for update, value in zip(updates, shown, strict=True)]
    return tab.form.read(shown)


@pytest.mark.parametrize("names", [[name] for name in presets()] + [["8gb", "subject"]], ids="-".join)
def test_a_chosen_preset_stands_in_the_form(tab: TrainTab, names: list[str]) -> None:
    request = {**filled(tab, names), "data": "a", "output": Path("a.safetensors")}
    start = {} if preset(*names).get("method") else START
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
    choice, message, *fields = tab.fill(["subject", "sara"])
    assert "rank: unknown option" in message
    assert all("value" not in update for update in (choice, *fields))


def test_the_choice_says_what_each_is_for(tab: TrainTab) -> None:
    assert [value for _, value in tab.presets.choices] == list(presets())
    assert tab.fill(["8gb", "style"])[0]["info"] == f"{presets()['8gb']} {presets()['style']}"
