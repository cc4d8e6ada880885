"""What a job looks like on the page: progress, losses, pictures and messages, read from its events.

Events are kept per job as they come, so each look at a long run reads only what is new.
"""

import html
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas

from studio.jobs import Job, JobStore, Kind, Reported

T = TypeVar("T")

CHART_POINTS = 240
SHOWN_MESSAGES = 3

_TITLES = {
    ("train", "running"): "Training",
    ("train", "done"): "Trained",
    ("generate", "running"): "Drawing",
    ("generate", "done"): "Done",
    ("plan", "running"): "Planning",
    ("plan", "done"): "Plan",
    ("compare", "running"): "Comparing",
    ("compare", "done"): "Compared",
}
_STATES = {"queued": "Waiting", "failed": "Failed", "cancelled": "Stopped", "interrupted": "Interrupted"}


@dataclass
class Story:
    """What a job's events tell so far.

    Attributes:
        losses: Step, loss and smoothed loss of each optimizer step.
        validation: Step and loss on the pictures held out of each measurement.
        pictures: Samples or results in order, with a caption.
        files: Files of the adapter that was written last, by part; its own is first, its word is empty.
        messages: What was said on the way.
        lines: The report and the messages.
    """

    job: Job
    number: int = 0
    step: int = 0
    total: int = 0
    speed: float = 0.0
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    first: tuple[int, float] | None = None

    def add(self, reported: Reported) -> None:
        """Take one more event in."""
        event, self.number = reported.event, reported.number
        if event.kind == "progress":
            self.step, self.total = event.step, event.total
            self.first = self.first or (event.step, reported.time)
            steps, seconds = event.step - self.first[0], reported.time - self.first[1]
            self.speed = steps / seconds if seconds > 0 else 0.0
            if "loss" in event.values:
                loss = event.values["loss"]
                self.losses.append((event.step, loss, event.values.get("loss_smoothed", loss)))
        elif event.kind in ("sample", "picture") and event.path:
            seed = event.path.stem.rpartition("-")[2]
            caption = f"step {event.step}" if event.kind == "sample" else f"seed {seed}"
            self.pictures.append((event.path, caption))
        elif event.kind == "saved" and event.path:
            self.files = {**(self.files if event.part else {}), event.part: event.path}
        if event.kind == "message":
            self.messages.append(event.message)
        if "validation_loss" in event.values:
            self.validation.append((event.step, event.values["validation_loss"]))
        if event.kind in ("report", "message") and event.message:
            self.lines.append(event.message)

    def shown_pictures(self) -> list[tuple[str, str]]:
        """Return the pictures that still exist, as a gallery takes them."""
        return [(str(path), caption) for path, caption in self.pictures if path.is_file()]

    def chart(self) -> pandas.DataFrame:
        """Return the losses as rows of step, loss and curve, thinned to as many as a chart shows."""
        shown = _thinned(self.losses)
        rows = [(step, loss, "each step") for step, loss, _ in shown]
        rows += [(step, smoothed, "smoothed") for step, _, smoothed in shown]
        rows += [(step, loss, "held out") for step, loss in _thinned(self.validation)]
        return pandas.DataFrame(rows, columns=["step", "loss", "curve"])


class Follower:
    """Keeps the stories of the latest jobs up to date."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._stories: dict[tuple[int, int], Story] = {}
        self._lock = threading.Lock()

    def latest(self, kind: Kind) -> Story | None:
        """Return the story of the newest job of a kind, or None."""
        jobs = self.store.list(kind=kind, limit=1)
        return self.story(jobs[0]) if jobs else None

    def story(self, job: Job) -> Story:
        """Return the story of a job with all its events so far."""
        with self._lock:
            story = self._stories.setdefault((job.id, job.attempt), Story(job))
            story.job = job
            for reported in self.store.events(job.id, after=story.number):
                story.add(reported)
            return story

    def ahead(self, job: Job) -> Job | None:
        """Return the job that runs while this one waits."""
        running = self.store.list(state="running", limit=1)
        return running[0] if running and running[0].id != job.id else None


def status(story: Story, *, note: str = "") -> str:
    """Return the state of a job as HTML: title, bar, facts and messages.

    Args:
        story: The job.
        note: A line about what it waits for.
    """
    job = story.job
    title = "Stopping" if job.stopping else _TITLES.get((job.kind, job.state), _STATES.get(job.state, ""))
    share = 100 if job.state == "done" else 100 * story.step // max(story.total, 1)
    facts = " · ".join(fact for fact in _facts(story) if fact)
    said = [notice(message, bad=False) for message in (*story.messages[-SHOWN_MESSAGES:], note) if message]
    said += [notice(job.message, bad=job.state == "failed")] if job.message else []
    return (
        f'<div class="job job-{job.state}" data-job="{job.id}" data-state="{job.state}">'
        f'<div class="job-line"><b>{title}</b><span>{html.escape(facts)}</span></div>'
        f'<div class="bar" role="progressbar" aria-label="{title}" aria-valuenow="{share}"'
        f' aria-valuemin="0" aria-valuemax="100"><div style="width: {share}%"></div></div>'
        f"{''.join(said)}</div>"
    )


def notice(message: str, *, bad: bool = True) -> str:
    """Return one message as HTML."""
    role, look = ("alert", "bad") if bad else ("status", "plain")
    return f'<div class="notice {look}" role="{role}">{html.escape(message)}</div>'


def _thinned(rows: list[T]) -> list[T]:
    every = max(1, len(rows) // CHART_POINTS)
    # Counted from the end, so that the newest is always there.
    return rows[::-every][::-1]


def _facts(story: Story) -> list[str]:
    job = story.job
    if job.started is None:
        return []
    seconds = (job.finished or time.time()) - job.started
    running = job.state == "running"
    left = (story.total - story.step) / story.speed if running and story.speed and story.total else 0.0
    return [
        f"step {story.step} of {story.total}" if story.total else "loading the model" if running else "",
        f"loss {story.losses[-1][2]:.4f}" if story.losses else "",
        duration(seconds),
        f"about {duration(left)} left" if left else "",
    ]


def duration(seconds: float) -> str:
    """Return a time as a person says it: "8 s", "2 min 05 s", "1 h 03 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
