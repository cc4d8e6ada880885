"""The estimate counts what is there, and the first steps are measured beside it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from studio.specs import Event, TrainSpec
from studio.trainers import estimate as module
from studio.trainers import forecast
from studio.trainers.estimate import Estimate, FirstSteps, duration, estimate, size
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]
CPU = torch.device("cpu")
MIB = 1024 * 1024
SARA = {"method": "sara", "quantile": 0.1, "rank_weight": 0.0, "reselect_at": 0}
needs_linux = pytest.mark.skipif(
    not module.CLEAR.exists(), reason="the peak of resident memory can be asked of Linux only"
)


def held(tensors: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rank": 8, "train_text_encoder": True},
        SARA,
        {**SARA, "optimizer": "adafactor"},
        {"method": "full"},
    ],
    ids=str,
)
def test_what_is_counted_is_what_is_there_after_a_step(
    tiny_sd: Callable[[], Any], spec: Spec, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def watch(pipe: Any, parameters: Any, **others: Any) -> Estimate:
        found["parameters"] = list(parameters)
        found["estimate"] = estimate(pipe, found["parameters"], **others)
        return found["estimate"]

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        entries = (value for entry in optimizer.state.values() for value in entry.values())
        found["moments"] = held(value for value in entries if torch.is_tensor(value) and value.numel() > 1)
        found["gradients"] = held(parameter.grad for parameter in found["parameters"])

    monkeypatch.setattr("studio.trainers.forecast.estimate", watch)
    handle = register_optimizer_step_post_hook(look)
    pipe = tiny_sd()
    base = held(
        value
        for part in (pipe.unet, pipe.vae, pipe.text_encoder)
        for value in (*part.parameters(), *part.buffers())
    )
    try:
        own = spec().model_dump(exclude={"options", "method"}) if "method" in values else {}
        train(pipe, TrainSpec.model_validate(own | values) if own else spec(**values))
    finally:
        handle.remove()
    parameters = held(found["parameters"])
    # Of each entry its place, and its value in the base.
    undo = 2 * parameters if values.get("method") == "sara" else 0
    assert found["estimate"] == Estimate(
        base=base + undo, trained=2 * parameters, gradients=found["gradients"], optimizer=found["moments"]
    )


def test_a_run_tells_the_estimate_before_and_the_measurements_after_its_first_steps(
    tiny_sd: Callable[[], Any], spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    monkeypatch.setattr(forecast, "SHORT", 0)
    train(tiny_sd(), spec(steps=3), on_event=events.append)
    kinds = [event.message.partition(":")[0] if event.kind == "message" else event.kind for event in events]
    assert kinds == ["report", "Memory", "progress", "progress", "Measured", "progress"]
    told, measured = events[1].message, events[4].message
    assert re.search(r"^Memory: about .*, activations .*\. Time: roughly .* s a step, .* in all\.$", told)
    assert re.search(r"\d s a step \(estimated .* s\), about .* in all\.$", measured)
    if module.CLEAR.exists():
        assert re.search(r"more at their peak \(estimated .*iB\)", measured)


class Work:
    """Steps that hold memory for a while."""

    def __init__(self, expected: Estimate, *, steps: int = 2) -> None:
        self.watch = FirstSteps(expected, CPU, steps=steps)
        self.said: list[str | None] = []

    def run(self, number: int, *, for_a_while: int, kept: int = 0) -> "Work":
        self.watch.begin()
        keep = torch.ones(kept * MIB // 4)
        work = torch.ones(for_a_while * MIB // 4)
        del work
        self.said.append(self.watch.end(1, 0.5))
        for step in range(2, number + 1):
            self.said.append(self.watch.end(step, 0.2))
        assert keep.numel() == kept * MIB // 4
        return self


def mebibytes(text: str | None) -> list[float]:
    assert text is not None
    return [
        float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]
        for number, unit in re.findall(r"([\d.e+]+) (KiB|MiB|GiB)", text)
    ]


@needs_linux
def test_the_peak_of_the_first_steps_is_told_beside_what_was_estimated() -> None:
    expected = Estimate(100 * MIB, 0, 60 * MIB, 60 * MIB, activations=250 * MIB, seconds=0.3)
    work = Work(expected, steps=40).run(2, for_a_while=300, kept=120)
    assert work.said[0] is None
    rise, estimated, total = mebibytes(work.said[1])
    assert 400 < rise < 480, "other threads of the process may take a little meanwhile"
    assert estimated == 370 and total == pytest.approx(100 + rise, abs=2)
    assert "0.2 s a step (estimated 0.3 s), about 8 s in all" in str(work.said[1])


@needs_linux
def test_an_earlier_peak_of_the_process_does_not_count() -> None:
    earlier = torch.ones(400 * MIB // 4)
    del earlier
    rise, *_ = mebibytes(Work(Estimate(0, 0, 0, 0)).run(2, for_a_while=50).said[1])
    assert 45 < rise < 130


def test_where_memory_cannot_be_measured_only_the_time_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "CLEAR", tmp_path / "none" / "clear_refs")
    said = Work(Estimate(0, 0, 0, 0), steps=100).run(2, for_a_while=1).said
    assert said == [None, "Measured: 0.2 s a step, about 20 s in all."]


@needs_linux
def test_a_run_of_one_step_has_no_warm_step_to_time() -> None:
    (said,) = Work(Estimate(0, 0, 0, 0), steps=1).run(1, for_a_while=1).said
    assert said is not None and "a step, about" not in said


def test_the_words_for_sizes_and_times() -> None:
    assert [size(number) for number in (0, 1023, 2048, 5 * MIB, 3.5 * 1024 * MIB)] == [
        "0 bytes",
        "1023 bytes",
        "2 KiB",
        "5 MiB",
        "3.5 GiB",
    ]
    assert [duration(seconds) for seconds in (3, 600, 7200)] == ["3 s", "10 min", "2.0 h"]


def test_tied_parameters_are_counted_once(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    before = estimate(pipe, [])
    pipe.unet.tied = nn.ParameterList([pipe.unet.conv_in.weight])
    assert estimate(pipe, []) == before
    trained = estimate(pipe, [pipe.unet.conv_in.weight])
    own = held([pipe.unet.conv_in.weight])
    assert trained == Estimate(before.base - own, 2 * own, own, 2 * own)
