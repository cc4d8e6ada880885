"""What the page shows of a job."""

from pathlib import Path

import pytest

from studio.jobs import JobStore
from studio.specs import Event
from studio.ui.follow import CHART_POINTS, Follower, Story, duration, status


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def started(store: JobStore) -> int:
    number = store.submit("train", {})
    store.claim("worker")
    return number


def step(index: int, total: int = 10, loss: float = 0.5) -> Event:
    values = {"loss": loss, "loss_smoothed": loss + 0.1}
    return Event(kind="progress", step=index, total=total, values=values)


def latest(store: JobStore) -> Story:
    story = Follower(store).latest("train")
    assert story is not None
    return story


def test_there_is_no_story_before_the_first_job(store: JobStore) -> None:
    assert Follower(store).latest("train") is None


def test_a_running_job_shows_its_step_its_loss_and_its_share(store: JobStore) -> None:
    number = started(store)
    store.report(number, step(4))
    shown = status(latest(store))
    assert 'data-state="running"' in shown
    assert "step 4 of 10" in shown and "loss 0.6000" in shown
    assert 'aria-valuenow="40"' in shown and "width: 40%" in shown


def test_new_events_are_added_to_what_is_known(store: JobStore) -> None:
    follower, number = Follower(store), started(store)
    store.report(number, step(1))
    assert follower.latest("train").step == 1  # type: ignore[union-attr]
    store.report(number, step(2))
    story = follower.latest("train")
    assert story is not None
    assert [index for index, *_ in story.losses] == [1, 2]


def test_a_retry_starts_a_new_story(store: JobStore) -> None:
    follower, number = Follower(store), started(store)
    store.report(number, step(3))
    follower.latest("train")
    store.fail(number, "broken")
    store.retry(number)
    story = follower.latest("train")
    assert story is not None
    assert (story.losses, story.step) == ([], 0)


def test_pictures_count_separately_from_denoising_steps(store: JobStore, tmp_path: Path) -> None:
    number = started(store)
    picture = tmp_path / "0001-42.png"
    picture.write_bytes(b"")
    store.report(number, step(8))
    store.report(number, Event(kind="picture", path=picture, step=1, total=4))
    store.report(number, Event(kind="sample", path=tmp_path / "gone.png", step=5))
    story = latest(store)
    assert (story.step, story.total) == (8, 10)
    assert story.shown_pictures() == [(str(picture), "seed 42")]


def test_the_chart_is_thinned_and_keeps_the_newest_step(store: JobStore) -> None:
    story = Story(job=store.get(started(store)))
    story.losses = [(index, 1.0, 2.0) for index in range(1, 1501)]
    chart = story.chart()
    assert list(chart.columns) == ["step", "loss", "curve"]
    assert chart["step"].max() == 1500
    assert CHART_POINTS <= (chart["curve"] == "smoothed").sum() <= 2 * CHART_POINTS
    assert set(chart[chart["curve"] == "smoothed"]["loss"]) == {2.0}


def test_a_failure_is_shown_as_text_and_never_as_markup(store: JobStore) -> None:
    number = started(store)
    store.fail(number, "cannot read <script>alert(1)</script>")
    shown = status(latest(store))
    assert 'role="alert"' in shown and "&lt;script&gt;" in shown and "<script>" not in shown


def test_what_is_said_on_the_way_is_shown_beside_the_state(store: JobStore) -> None:
    number = started(store)
    for index in range(5):
        store.report(number, Event(kind="message", message=f"message <{index}>"))
    shown = status(latest(store))
    assert [f"message &lt;{index}&gt;" in shown for index in range(5)] == [False, False, True, True, True]
    assert latest(store).lines == [f"message <{index}>" for index in range(5)]
    assert 'role="status"' in shown and 'role="alert"' not in shown
    store.fail(number, "broken")
    assert 'role="alert"' in status(latest(store)) and "message &lt;4&gt;" in status(latest(store))


def test_the_files_of_the_last_adapter_and_the_report_are_kept(store: JobStore) -> None:
    number = started(store)
    store.report(number, Event(kind="report", message="5 pictures"))
    for stem in ("dog-step-000005", "dog"):
        store.report(number, Event(kind="saved", path=Path(f"{stem}.safetensors"), message="wrote it"))
        store.report(number, Event(kind="saved", path=Path(f"{stem}-token.safetensors"), part="token"))
    story = latest(store)
    assert story.files == {"": Path("dog.safetensors"), "token": Path("dog-token.safetensors")}
    assert story.lines == ["5 pictures"]


def test_the_loss_on_pictures_held_out_is_a_curve_of_its_own(store: JobStore) -> None:
    number = started(store)
    measured = Event(kind="message", message="Validation", step=0, values={"validation_loss": 0.25})
    store.report(number, step(1))
    assert set(latest(store).chart()["curve"]) == {"each step", "smoothed"}
    store.report(number, measured)
    store.report(number, measured.model_copy(update={"step": 1, "values": {"validation_loss": 0.125}}))
    chart = latest(store).chart()
    curve = chart[chart["curve"] == "held out"]
    assert list(zip(curve["step"], curve["loss"], strict=True)) == [(0, 0.25), (1, 0.125)]


@pytest.mark.parametrize(
    ("seconds", "said"), [(7.6, "8 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3780, "1 h 03 min"), (-1, "0 s")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
