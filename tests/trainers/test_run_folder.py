import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.errors import OutputError, TrainingError
from studio.flags import Parser, read_spec_arguments
from studio.specs import Event, TrainSpec
from studio.trainers.loop import train
from studio.trainers.run_folder import RunFolder

Spec = Callable[..., TrainSpec]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"min_snr_gamma": None, "sample_prompts": ('a "b"', "ü"), "block_ranks": {"attn1": 3}},
        {"method": "sara", "rank": None, "exclude": None, "quantile": 0.1, "threshold": None},
    ],
    ids=["plain", "texts-and-none", "sara"],
)
def test_the_written_settings_are_those_of_the_run(spec: Spec, values: dict[str, Any]) -> None:
    if values.get("method") == "sara":
        own = spec().model_dump(exclude={"options", "method"})
        run = TrainSpec.model_validate(own | {"method": "sara", "quantile": 0.1, "overwrite": True})
    else:
        run = spec(**values, overwrite=True)
    folder = RunFolder(run.output)
    folder.begin(run)
    read, _ = read_spec_arguments(Parser(prog="t"), TrainSpec, ["--config", str(folder.spec), "--overwrite"])
    assert read == run


def test_the_log_has_a_line_for_each_event_also_after_a_torn_one(spec: Spec) -> None:
    folder = RunFolder(spec().output)
    folder.record(Event(kind="progress", step=1, total=2, values={"loss": 0.5}))
    with folder.log.open("a") as file:
        file.write('{"time":"20')
    folder.record(Event(kind="saved", path=Path("x"), message="ü\n"))
    first, torn, last = folder.log.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) | {"time": 0} == {
        "time": 0,
        "kind": "progress",
        "step": 1,
        "total": 2,
        "values": {"loss": 0.5},
    }
    assert torn == '{"time":"20'
    assert json.loads(last)["path"] == str(Path("x").absolute()) and json.loads(last)["message"] == "ü\n"


def test_a_run_leaves_one_tidy_folder(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    events: list[Event] = []
    run = spec(steps=6, save_every=1, keep_adapters=2, checkpoint_every=2, keep_checkpoints=1)
    train(tiny_sd(), run, on_event=events.append)
    folder = RunFolder(run.output)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        ".lock",
        "adapters",
        "checkpoints",
        "log.jsonl",
        "spec.toml",
    ]
    assert sorted(path.name for path in folder.adapters.iterdir()) == [
        "dog-step-000004.safetensors",
        "dog-step-000005.safetensors",
    ]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000006.safetensors"]
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["kind"] for line in lines] == [event.kind for event in events]


def test_a_folder_that_cannot_be_written_says_so(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match=r"dog-run cannot be written: .*choose another output"):
        RunFolder(spec().output).begin(spec())


@pytest.mark.parametrize("name", ["data", "class_data", "validation_data", "start_from"])
def test_what_a_run_reads_is_not_removed_with_an_earlier_run(spec: Spec, name: str) -> None:
    folder = RunFolder(spec().output)
    inside = folder.adapters / "a.safetensors" if name == "start_from" else folder.samples
    inside.parent.mkdir(parents=True)
    inside.touch() if name == "start_from" else inside.mkdir()
    run = spec(overwrite=True, **{name: inside})
    for step in (folder.check, folder.begin):
        with pytest.raises(OutputError, match=rf"{name}: .* lies in the folder of an earlier run"):
            step(run)
    assert inside.exists()


def test_two_runs_do_not_write_to_one_folder(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, run = tiny_sd(), spec(steps=1)
    with pytest.raises(TrainingError, match="rank must be at most"):
        train(pipe, spec(rank=4096))
    assert not RunFolder(run.output).path.exists(), "a run that cannot start leaves no folder"
    with RunFolder(run.output).held(), pytest.raises(OutputError, match="another run is writing to"):
        train(pipe, run)
    train(pipe, run)
