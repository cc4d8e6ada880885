"""Measuring on pictures that are held out, stopping early, trackers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.adapters.files import load_adapter
from studio.data.dataset import read_dataset
from studio.errors import SpecError, TrainingError
from studio.specs import Event, TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.run_folder import RunFolder
from studio.trainers.validation import Validation

Spec = Callable[..., TrainSpec]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on few draws: their number settles how sure a loss is, and nothing that is tested here."""
    monkeypatch.setattr("studio.trainers.run.DRAWS", 4)


def measured(events: list[Event]) -> dict[int, float]:
    return {
        event.step: event.values["validation_loss"] for event in events if "validation_loss" in event.values
    }


def trained_on(events: list[Event]) -> list[float]:
    return [event.values["loss"] for event in events if event.kind == "progress"]


def test_the_loss_is_measured_at_the_start_on_the_way_and_at_the_end(
    tiny_sd: Callable[[], Any], spec: Spec
) -> None:
    pipe, first, again, seldom = tiny_sd(), [], [], []
    values = {"steps": 5, "validation_split": 0.25, "learning_rate": 1e-2, "dropout": 0.3}
    train(pipe, spec(**values, validate_every=2), on_event=first.append)
    train(pipe, spec(**values, validate_every=2, overwrite=True), on_event=again.append)
    train(pipe, spec(**values, overwrite=True), on_event=seldom.append)
    assert list(measured(first)) == [0, 2, 4, 5] and measured(first) == measured(again)
    assert measured(seldom) == {step: measured(first)[step] for step in (0, 5)}
    assert trained_on(first) == trained_on(seldom), "measuring changes no training"
    assert len(set(measured(first).values())) == 4


def test_the_best_adapter_is_kept_and_training_stops_early(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, events = tiny_sd(), []
    run = spec(
        steps=60,
        validation_split=0.25,
        validate_every=1,
        patience=3,
        learning_rate=0.3,
        rank=4,
        schedule="constant",
    )
    train(pipe, run, on_event=events.append)
    losses = measured(events)
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 3 < 60
    assert "Stopped early after" in events[-1].message and "for 3 measurements" in events[-1].message
    if best:
        adapter = load_adapter(RunFolder(run.output).best_adapter, base=pipe)
        assert adapter.metadata["ss_steps"] == str(best)


def test_patience_counts_measurements_without_a_better_one() -> None:
    validation = Validation(patience=2)
    losses = [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.0]
    seen = [(validation.better(loss), validation.exhausted) for loss in losses]
    assert [better for better, _ in seen] == [True, True, False, False, True, False, False]
    assert [over for _, over in seen] == [False, False, False, True, False, False, True]


def test_measuring_goes_on_where_it_was(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, whole, parts = tiny_sd(), [], []
    values = {"steps": 6, "validation_split": 0.25, "validate_every": 1, "patience": 50}
    train(pipe, spec(**values), on_event=whole.append)
    asked = iter([False] * 3)
    train(pipe, spec(**values, overwrite=True), on_event=parts.append, stop=lambda: next(asked, True))
    train(pipe, spec(**values, resume=True), on_event=parts.append)
    said = [[event.message for event in events if "Validation" in event.message] for events in (whole, parts)]
    assert said[0] == said[1] and len(said[0]) == 7


def test_asking_for_measurements_without_pictures_is_refused(
    tiny_sd: Callable[[], Any], spec: Spec, folder: Path
) -> None:
    assert read_dataset(spec()).validation is None
    with pytest.raises(TrainingError, match=r"no pictures are held out. Give validation_split"):
        train(tiny_sd(), spec(validate_every=1))
    with pytest.raises(SpecError, match=r"patience: needs measurements on the way. Give validate_every"):
        parse_spec(TrainSpec, {"data": "d", "output": "x.safetensors", "patience": 2})


def test_a_tracker_gets_what_the_events_say(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: list[Event] = []
    run = spec(steps=3, tracker="tensorboard", validation_split=0.25)
    train(tiny_sd(), run, on_event=events.append)
    (written,) = RunFolder(run.output).tracker.rglob("events.out*")
    found = EventAccumulator(str(written)).Reload()
    assert [item.value for item in found.Scalars("loss")] == pytest.approx(trained_on(events))
    assert [item.step for item in found.Scalars("loss")] == [1, 2, 3]
    assert [item.step for item in found.Scalars("validation_loss")] == [0, 3]


def test_a_tracker_that_is_not_there_is_refused(
    tiny_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match=r"tracker 'tensorbord' is unknown. Did you mean 'tensorboard'"):
        train(tiny_sd(), spec(tracker="tensorbord"))
    monkeypatch.setattr("studio.trainers.runtime.get_available_trackers", list)
    with pytest.raises(TrainingError, match=r"'wandb' is not installed. Run pip install wandb"):
        train(tiny_sd(), spec(tracker="wandb"))


def test_a_run_that_stopped_early_does_not_go_on(
    tiny_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, rising = tiny_sd(), itertools.count(1.0)
    events: list[Event] = []
    monkeypatch.setattr("studio.trainers.run.mean_loss", lambda *_, **__: next(rising))
    values = {"steps": 8, "validation_split": 0.25, "validate_every": 1, "patience": 2, "checkpoint_every": 1}
    first = train(pipe, spec(**values), on_event=events.append)
    again = train(pipe, spec(**values, resume=True), on_event=events.append)
    assert len(trained_on(events)) == 2 and "Stopped early after 2 of 8 steps" in events[-1].message
    assert first.metadata["ss_steps"] == again.metadata["ss_steps"] == "2"
