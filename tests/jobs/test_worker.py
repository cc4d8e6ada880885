"""The worker: real jobs on a tiny base, failures that it outlives, and its ways to leave."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.jobs import Job, JobStore
from studio.specs import TrainSpec, parse_spec
from studio.worker import Worker
from studio.workspace import Workspace, workspace


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return workspace(tmp_path / "home")


@pytest.fixture
def worker(space: Workspace) -> Worker:
    return Worker(space)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, short_sd: Callable[[], Any]) -> Path:
    folder = tmp_path_factory.mktemp("base")
    short_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def training(space: Workspace, base: Path) -> dict[str, Any]:
    """Return a training request on two pictures that lie in the workspace."""
    data = space.uploads / "set"
    data.mkdir()
    for index, color in enumerate(("navy", "olive")):
        Image.new("RGB", (64, 64), color).save(data / f"{index}.png")
    output = str(space.adapters / "dog.safetensors")
    return {
        "base": str(base), "data": str(data), "output": output, "prompt": "a dog",
        "steps": 3, "batch_size": 1, "rank": 2,
    }  # fmt: skip


def run(worker: Worker, kind: Any, spec: dict[str, Any]) -> Job:
    number = worker.store.submit(kind, spec)
    job = worker.store.claim(worker.name)
    assert job is not None
    worker.perform(job)
    return worker.store.get(number)


def test_it_trains_and_then_draws_with_the_adapter(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    trained = run(worker, "train", training)
    assert (trained.state, trained.message) == ("done", "")
    events = [reported.event for reported in worker.store.events(trained.id)]
    assert [event.step for event in events if event.kind == "progress"] == [1, 2, 3]
    assert [str(event.path) for event in events if event.kind == "saved"] == [training["output"]]

    request = {
        "base": training["base"], "prompt": "a dog", "steps": 2, "count": 2, "seed": 5,
        "adapters": [{"path": training["output"], "weight": 0.5}], "output": str(space.pictures / "a"),
    }  # fmt: skip
    drawn = run(worker, "generate", request)
    assert (drawn.state, drawn.message) == ("done", "")
    pictures = [
        reported.event.path for reported in worker.store.events(drawn.id) if reported.event.kind == "picture"
    ]
    assert [path.name for path in pictures if path] == ["0000-5.png", "0001-6.png"]
    assert all(path and path.is_file() for path in pictures)


def test_a_wrong_specification_fails_with_its_problems(worker: Worker, training: dict[str, Any]) -> None:
    job = run(worker, "train", training | {"steps": 0, "stepz": 3})
    assert job.state == "failed"
    assert "steps: Input should be greater than or equal to 1, got 0." in job.message
    assert "stepz: unknown option. Did you mean 'steps'?" in job.message


def test_an_output_outside_the_workspace_is_refused(
    worker: Worker, training: dict[str, Any], tmp_path: Path
) -> None:
    job = run(worker, "train", training | {"output": str(tmp_path / "dog.safetensors")})
    assert job.state == "failed"
    assert "outside the workspace" in job.message
    assert not (tmp_path / "dog.safetensors").exists()


def test_a_relative_output_lies_in_the_workspace(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    assert run(worker, "train", training | {"output": "adapters/near.safetensors"}).state == "done"
    assert (space.adapters / "near.safetensors").is_file()


def test_an_unexpected_error_is_one_line_and_its_traceback_a_file(
    worker: Worker, space: Workspace, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio import api

    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("out of patience\nsecond line")

    monkeypatch.setattr(api, "train", break_down)
    job = run(worker, "train", training)
    log = space.runs / f"job-{job.id}.log"
    assert job.state == "failed"
    assert job.message == f"Unexpected RuntimeError: out of patience. The details are in {log}."
    assert "break_down" in log.read_text()
    monkeypatch.undo()
    assert run(worker, "train", training).state == "done"


def when_training(worker: Worker, number: int, act: Callable[[], Any]) -> threading.Thread:
    """Do something as soon as a job reports its first step."""

    def watch() -> None:
        while not any(reported.event.kind == "progress" for reported in worker.store.events(number)):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_cancel_stops_a_training_and_keeps_its_adapter(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    when_training(worker, 1, lambda: worker.store.cancel(1))
    job = run(worker, "train", training | {"steps": 100_000})
    assert job.state == "cancelled"
    assert (space.adapters / "dog.safetensors").is_file()


def test_cancel_while_class_pictures_are_drawn_is_no_failure(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    when_training(worker, 1, lambda: worker.store.cancel(1))
    drawn = {"class_prompts": ["a cat"], "class_pictures": 1000, "sample_steps": 1}
    job = run(worker, "train", training | drawn)
    assert job.state == "cancelled" and not (space.adapters / "dog.safetensors").exists()
    said = [event.event.message for event in worker.store.events(1) if event.event.kind == "message"]
    assert "of 1000 are drawn and kept in" in said[-1]


def test_leaving_in_the_middle_interrupts_the_job_so_that_it_can_be_retried(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    when_training(worker, 1, worker.leaving.set)
    job = run(worker, "train", training | {"steps": 100_000, "overwrite": True})
    assert job.state == "interrupted"
    assert "the page was closed" in job.message
    assert (space.adapters / "dog.safetensors").is_file()
    assert worker.store.retry(job.id).state == "queued"


def attempt(worker: Worker, number: int) -> Job:
    """Retry a job and run it to its end."""
    worker.store.retry(number)
    job = worker.store.claim(worker.name)
    assert job is not None and job.id == number
    worker.perform(job)
    return worker.store.get(number)


def told(worker: Worker, number: int) -> tuple[list[int], list[str]]:
    """Return the steps and the messages of a job's current attempt."""
    events = [reported.event for reported in worker.store.events(number)]
    steps = [event.step for event in events if event.kind == "progress"]
    return steps, [event.message for event in events if event.kind == "message"]


def test_a_retry_goes_on_from_the_newest_checkpoint_of_a_worker_that_died(
    worker: Worker, training: dict[str, Any]
) -> None:
    from studio import api

    number = worker.store.submit("train", training)
    worker.store.claim("dead")
    asked = iter([False, False, True])
    api.train(parse_spec(TrainSpec, training), stop=lambda: next(asked))
    worker.store.interrupt(number, "its worker ended unexpectedly")

    job = attempt(worker, number)
    assert (job.state, job.attempt, job.message) == ("done", 2, "")
    steps, said = told(worker, number)
    assert steps == [3] and "Goes on after step 2." in said


def test_a_retry_starts_anew_where_there_is_no_checkpoint_and_says_so(
    worker: Worker, training: dict[str, Any]
) -> None:
    output = Path(training["output"])
    left = output.with_name("dog-run") / "adapters" / "dog-step-000001.safetensors"
    left.parent.mkdir(parents=True)
    for path in (output, left):
        path.write_bytes(b"of the first attempt")
    first = run(worker, "train", training)
    assert first.state == "failed" and "exists" in first.message, "a first attempt replaces nothing"

    job = attempt(worker, first.id)
    assert (job.state, job.message) == ("done", "")
    steps, said = told(worker, first.id)
    assert steps == [1, 2, 3] and any("the run starts anew" in message for message in said)
    assert not left.exists() and output.stat().st_size > 100


def test_a_retry_draws_over_what_the_first_attempt_drew(
    worker: Worker, space: Workspace, training: dict[str, Any]
) -> None:
    folder = space.pictures / "a"
    folder.mkdir()
    (folder / "0000-5.png").write_bytes(b"half a picture")
    request = {
        "base": training["base"], "prompt": "a dog", "steps": 1, "seed": 5, "output": str(folder)
    }  # fmt: skip
    first = run(worker, "generate", request)
    assert first.state == "failed" and "exists" in first.message
    assert attempt(worker, first.id).state == "done"


def test_a_comparison_is_drawn_into_the_workspace(worker: Worker, space: Workspace, base: Path) -> None:
    grid = space.pictures / "compare" / "compare.png"
    request = {"base": str(base), "prompt": "a fox", "steps": 1, "methods": ["merge"], "grid": str(grid)}
    done = run(worker, "compare", request)
    assert (done.state, done.message) == ("done", "")
    assert grid.is_file() and grid.with_suffix(".json").is_file()
    outside = run(worker, "compare", {**request, "grid": str(space.root.parent / "grid.png")})
    assert outside.state == "failed" and "outside the workspace" in outside.message


@pytest.fixture
def attached(space: Workspace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "studio.worker", "--attached", "--home", str(space.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_plan_is_drawn_into_the_workspace_and_nowhere_else(
    worker: Worker, space: Workspace, base: Path
) -> None:
    request = {"base": str(base), "steps": 4, "picture": str(space.pictures / "plan" / "plan.png")}
    done = run(worker, "plan", request)
    assert (done.state, done.message) == ("done", "")
    (event,) = (each.event for each in worker.store.events(done.id))
    assert (event.kind, event.path) == ("picture", space.pictures / "plan" / "plan.png")
    assert event.path is not None and Image.open(event.path).width > 700
    again = run(worker, "plan", request)
    assert again.state == "failed" and "exists. Choose another name" in again.message
    outside = run(worker, "plan", {**request, "picture": str(space.root.parent / "plan.png")})
    assert outside.state == "failed" and "outside the workspace" in outside.message


def test_an_attached_worker_leaves_when_the_page_is_gone(
    attached: subprocess.Popen[str], space: Workspace
) -> None:
    store = JobStore(space.database)
    number = store.submit("generate", {"prompt": "a fox", "count": 0})
    deadline = time.monotonic() + 60
    while store.get(number).active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.get(number).state == "failed", "it serves the queue"
    assert attached.poll() is None, "a failed job does not end it"
    assert attached.stdin
    attached.stdin.close()
    assert attached.wait(30) == 0
