"""The clock of the page: it costs the browser next to nothing while nothing happens."""

from pathlib import Path

import gradio as gr
import pytest

from studio.jobs import JobStore
from studio.ui.app import build
from studio.ui.follow import Follower
from studio.ui.panel import Panel
from studio.workspace import workspace


@pytest.fixture
def panel(tmp_path: Path) -> Panel:
    panel = Panel("train", Follower(JobStore(workspace(tmp_path).database)), lambda: "", idle="")
    with gr.Blocks():
        panel.buttons("Start")
        panel.state()
    return panel


def test_a_tick_names_no_component_that_the_browser_lays_out(tmp_path: Path) -> None:
    page = build(tmp_path)
    ticks = [event for event in page.fns.values() if any(name == "tick" for _, name in event.targets)]
    outputs = [component for event in ticks for component in event.outputs]
    assert len(ticks) == 1 and outputs
    assert all(isinstance(component, gr.State) for component in outputs)


def test_the_pulse_changes_until_the_page_shows_what_there_is(panel: Panel) -> None:
    marks, *_ = panel.refresh({})
    assert panel.beat(marks) == gr.skip()
    panel.follower.store.submit("train", {"base": "starter"})
    first, second = panel.beat(marks), panel.beat(marks)
    assert isinstance(first, int) and first != second, "what got lost on its way is sent again"
    marks, *_ = panel.refresh(marks)
    assert panel.beat(marks) == gr.skip()
