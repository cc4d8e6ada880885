"""The process that trains and generates: takes jobs from the queue, reports to it, stops when asked.

``python -m studio.worker [--home DIR] [--attached]``. It keeps the base model warm between jobs and outlives
a job that fails. With ``--attached`` it ends when its standard input closes, that is when the page is gone;
a job that runs then is stopped safely.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.errors import Interrupted, StudioError
from studio.jobs import Job, JobStore, Kind
from studio.specs import Event, GenerateSpec, TrainSpec, parse_spec
from studio.specs.composing import CompareSpec, PlanSpec
from studio.workspace import Workspace, workspace

HEARTBEAT_SECONDS = 0.5
POLL_SECONDS = 0.2

log = logging.getLogger("studio.worker")


@dataclass(frozen=True)
class Sort:
    """What jobs of one kind ask for.

    Attributes:
        spec_type: Their specification.
        output: Its field for what is written, which must lie in the workspace.
        again: Fields of further attempts: what an earlier one left is the job's own.
    """

    spec_type: Any
    output: str
    again: Mapping[str, Any]


SORTS: Mapping[Kind, Sort] = {
    "train": Sort(TrainSpec, "output", {"resume": True, "overwrite": True}),
    "generate": Sort(GenerateSpec, "output", {"overwrite": True}),
    "plan": Sort(PlanSpec, "picture", {"overwrite": True}),
    "compare": Sort(CompareSpec, "grid", {"overwrite": True}),
}


class Worker:
    """Runs the jobs of one workspace, one after the other.

    Args:
        space: Whose queue to serve, and where outputs must lie.
    """

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.store = JobStore(space.database)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.leaving = threading.Event()

    def serve(self) -> None:
        """Take jobs until ``leaving`` is set."""
        while not self.leaving.is_set():
            job = self.store.claim(self.name)
            if job is None:
                self.leaving.wait(POLL_SECONDS)
            else:
                self.perform(job)

    def perform(self, job: Job) -> None:
        """Run one claimed job to its end, whatever the end is."""
        log.info("job %d: %s starts", job.id, job.kind)
        with _Watch(self.store, job, self.name) as watch:
            try:
                self._run(job, stop=lambda: watch.asked_to_stop or self.leaving.is_set())
            except StudioError as error:
                self.store.fail(job.id, str(error), self.name)
            except Exception as error:
                self.store.fail(job.id, self._unexpected(job, error), self.name)
            else:
                if self.leaving.is_set() and not watch.asked_to_stop:
                    message = "Interrupted: the page was closed. Saved files are kept; retry it."
                    self.store.interrupt(job.id, message, self.name)
                self.store.finish(job.id, self.name)
        _release_memory()
        log.info("job %d: %s", job.id, self.store.get(job.id).state)

    def _run(self, job: Job, *, stop: Callable[[], bool]) -> None:
        sort = SORTS[job.kind]
        spec = parse_spec(sort.spec_type, {**job.spec, **(sort.again if job.attempt > 1 else {})})
        spec = spec.model_copy(update={sort.output: self.space.inside(getattr(spec, sort.output))})

        def report(event: Event) -> None:
            self.store.report(job.id, event)

        try:
            _carry_out(job.kind)(spec, on_event=report, stop=stop)
        except Interrupted as error:
            report(Event(kind="message", message=str(error)))

    def _unexpected(self, job: Job, error: Exception) -> str:
        """Write the traceback to the job's log file and return one line for the user."""
        path = self.space.runs / f"job-{job.id}.log"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        what = (str(error).strip() or "no message").splitlines()[0]
        return f"Unexpected {type(error).__name__}: {what}. The details are in {path}."


def _carry_out(kind: Kind) -> Callable[..., Any]:
    """Return what does jobs of a kind; importing it takes seconds."""
    if kind == "plan":
        from studio.composing.plan import show_plan

        # Done before anybody could stop it.
        return lambda spec, *, on_event, stop: show_plan(spec, on_event=on_event)
    if kind == "compare":
        from studio.composing.compare import compare

        return compare
    from studio import api

    return api.train if kind == "train" else api.generate


def _release_memory() -> None:
    """Let the next job have what this one held; importing torch takes seconds."""
    from studio.models.device import release_memory

    release_memory()


class _Watch:
    """Sends heartbeats for a job from a thread and learns whether it was asked to stop."""

    def __init__(self, store: JobStore, job: Job, worker: str) -> None:
        self.asked_to_stop = False
        self._store, self._job, self._worker = store, job, worker
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                if not self._store.heartbeat(self._job.id, self._worker):
                    self.asked_to_stop = True
            except StudioError as error:
                log.warning("job %d: %s", self._job.id, error)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _warm_up() -> None:
    """Do the slow imports and load the embedded base before the first job asks for them."""
    from studio import api

    try:
        api.warm("starter")
    except StudioError as error:
        log.info("not warmed up: %s", error)


def _leave_with_page(worker: Worker) -> None:
    """Wait until standard input closes, then ask the worker to leave."""
    sys.stdin.read()
    worker.leaving.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the queue until told to leave; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studio.worker", description="Runs the page's jobs.")
    parser.add_argument("--home", help="workspace folder; default: STUDIO_HOME or ~/.studio")
    parser.add_argument("--attached", action="store_true", help="end when standard input closes")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        worker = Worker(workspace(given.home))
    except StudioError as error:
        log.error("%s", error)
        return error.exit_code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.leaving.set())
    if given.attached:
        threading.Thread(target=_leave_with_page, args=(worker,), daemon=True).start()
    _warm_up()
    worker.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
