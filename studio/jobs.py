"""A durable queue of jobs, such as trainings and drawings: the page puts them in, a worker takes them out.

Everything is in one SQLite file, so a page that is loaded again sees what it saw before. A job is ``queued``,
then ``running``, then ``done``, ``failed``, ``cancelled`` or ``interrupted`` (its worker died).
"""

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from studio.errors import OutputError, UsageError
from studio.specs.events import Event
from studio.workspace import Workspace, inside_workspace, workspace

__all__ = ["Job", "JobStore", "Kind", "Reported", "State", "Workspace", "inside_workspace", "workspace"]

Kind = Literal["train", "generate", "plan", "compare"]
State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    spec TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    message TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 1,
    stopping INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    host TEXT,
    pid INTEGER,
    submitted REAL NOT NULL,
    started REAL,
    finished REAL,
    heartbeat REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, id);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER NOT NULL REFERENCES jobs (id),
    attempt INTEGER NOT NULL,
    time REAL NOT NULL,
    event TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, attempt, number);
"""


@dataclass(frozen=True)
class Job:
    """One request and where it stands; times are seconds since the epoch.

    Attributes:
        message: Why it failed or was interrupted, in one line; empty otherwise.
        attempt: 1 and one more for each retry; events belong to one attempt.
        stopping: A running job was asked to stop and has not stopped yet.
    """

    id: int
    kind: Kind
    spec: dict[str, Any]
    state: State
    message: str
    attempt: int
    stopping: bool
    worker: str | None
    host: str | None
    pid: int | None
    submitted: float
    started: float | None
    finished: float | None
    heartbeat: float | None

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class Reported:
    """An event with its number (ascending over all jobs) and the time of its arrival."""

    number: int
    time: float
    event: Event


class JobStore:
    """The queue in one file; safe to use from any number of threads and processes.

    Args:
        path: SQLite file; made when missing.
        stale_after: Seconds without a heartbeat after which a running job counts as interrupted.

    Raises:
        OutputError: If the file cannot be made or is not a job queue.
    """

    def __init__(self, path: str | Path, *, stale_after: float = 60.0) -> None:
        self.path = Path(path)
        self.stale_after = stale_after
        self._local = threading.local()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder of the job queue {self.path}: {error.strerror}."
            ) from None
        self._run("PRAGMA journal_mode = WAL")
        for statement in SCHEMA.split(";"):
            self._run(statement)

    def submit(self, kind: Kind, spec: Mapping[str, Any]) -> int:
        """Queue a request and return its id; ``spec`` holds what the user gave: JSON values and paths."""
        if kind not in get_args(Kind):
            raise UsageError(f"unknown kind of job '{kind}'. Known: {', '.join(get_args(Kind))}.")
        text = json.dumps(dict(spec), default=_as_json)
        sql = "INSERT INTO jobs (kind, spec, submitted) VALUES (?, ?, ?) RETURNING id"
        return int(self._run(sql, kind, text, time.time())[0]["id"])

    def claim(self, worker: str) -> Job | None:
        """Give the oldest queued job to ``worker`` and return it, or None; no two workers get the same."""
        self.recover()
        now = time.time()
        rows = self._run(
            "UPDATE jobs SET state = 'running', worker = ?, host = ?, pid = ?, started = ?, heartbeat = ? "
            "WHERE id = (SELECT id FROM jobs WHERE state = 'queued' ORDER BY id LIMIT 1) RETURNING *",
            *(worker, socket.gethostname(), os.getpid(), now, now),
        )
        return _job(rows[0]) if rows else None

    def heartbeat(self, job_id: int, worker: str) -> bool:
        """Say that the worker lives; return whether it should go on: not asked to stop, and still its job."""
        rows = self._run(
            "UPDATE jobs SET heartbeat = ? "
            "WHERE id = ? AND worker = ? AND state = 'running' RETURNING stopping",
            *(time.time(), job_id, worker),
        )
        return bool(rows) and not rows[0]["stopping"]

    def report(self, job_id: int, event: Event) -> None:
        """Append an event to the job's current attempt.

        Raises:
            UsageError: If there is no such job.
        """
        if not self._run(
            "INSERT INTO events (job, attempt, time, event) "
            "SELECT id, attempt, ?, ? FROM jobs WHERE id = ? RETURNING number",
            *(time.time(), event.model_dump_json(), job_id),
        ):
            raise UsageError(f"there is no job {job_id}. `studio jobs` lists them.")

    def events(self, job_id: int, after: int = 0) -> Sequence[Reported]:
        """Return the events of the job's current attempt with numbers above ``after``, in order."""
        rows = self._run(
            "SELECT events.number, events.time, events.event FROM events JOIN jobs ON jobs.id = events.job "
            "AND jobs.attempt = events.attempt WHERE events.job = ? AND number > ? ORDER BY number",
            *(job_id, after),
        )
        return [Reported(row["number"], row["time"], Event.model_validate_json(row["event"])) for row in rows]

    def finish(self, job_id: int, worker: str | None = None) -> bool:
        """End a running job as ``done``, or ``cancelled`` if it was to stop; return whether it still ran.

        With ``worker`` given, only that worker's job is ended: one taken for dead has no say any more.
        """
        return self._end(job_id, "CASE stopping WHEN 1 THEN 'cancelled' ELSE 'done' END", "", worker)

    def fail(self, job_id: int, message: str, worker: str | None = None) -> bool:
        """End a running job as ``failed``; return whether it still ran."""
        return self._end(job_id, "'failed'", message, worker)

    def interrupt(self, job_id: int, message: str, worker: str | None = None) -> bool:
        """End a running job as ``interrupted``, to be retried at will; return whether it still ran."""
        return self._end(job_id, "'interrupted'", message, worker)

    def cancel(self, job_id: int) -> State:
        """Cancel a queued job at once, ask a running one to stop, leave others; return the state then."""
        queued = "UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state = 'queued'"
        self._run(queued, time.time(), job_id)
        self._run("UPDATE jobs SET stopping = 1 WHERE id = ? AND state = 'running'", job_id)
        return self.get(job_id).state

    def retry(self, job_id: int) -> Job:
        """Queue a failed, cancelled or interrupted job again, as its next attempt.

        Raises:
            UsageError: If it waits, runs or is done.
        """
        rows = self._run(
            "UPDATE jobs SET state = 'queued', attempt = attempt + 1, message = '', worker = NULL, "
            "started = NULL, finished = NULL "
            "WHERE id = ? AND state IN ('failed', 'cancelled', 'interrupted') RETURNING *",
            job_id,
        )
        if not rows:
            state = self.get(job_id).state
            raise UsageError(
                f"job {job_id} is {state}. Only failed, cancelled and interrupted jobs can be retried."
            )
        return _job(rows[0])

    def recover(self) -> Sequence[int]:
        """Mark running jobs whose worker is gone or silent as ``interrupted`` and return their ids."""
        host = socket.gethostname()
        lost = []
        for job in self.list(state="running"):
            silent = time.time() - (job.heartbeat or 0) > self.stale_after
            gone = job.host == host and job.pid is not None and not _alive(job.pid)
            why = "ended unexpectedly" if gone else f"was silent for {self.stale_after:.0f} s"
            message = f"Interrupted: its worker {why}. Saved files are kept; retry it."
            if (gone or silent) and self.interrupt(job.id, message, job.worker):
                lost.append(job.id)
        return lost

    def get(self, job_id: int) -> Job:
        """Return one job.

        Raises:
            UsageError: If there is none with this id.
        """
        rows = self._run("SELECT * FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise UsageError(f"there is no job {job_id}. `studio jobs` lists them.")
        return _job(rows[0])

    def list(self, kind: Kind | None = None, state: State | None = None, limit: int = -1) -> Sequence[Job]:
        """Return jobs, the newest first."""
        rows = self._run(
            "SELECT * FROM jobs WHERE kind = ifnull(?, kind) AND state = ifnull(?, state) "
            "ORDER BY id DESC LIMIT ?",
            *(kind, state, limit),
        )
        return [_job(row) for row in rows]

    def _end(self, job_id: int, state: str, message: str, worker: str | None) -> bool:
        return bool(
            self._run(
                f"UPDATE jobs SET state = {state}, message = ?, finished = ?, stopping = 0 "
                "WHERE id = ? AND state = 'running' AND worker = ifnull(?, worker) RETURNING id",
                *(message, time.time(), job_id, worker),
            )
        )

    def _run(self, sql: str, *values: Any) -> Sequence[sqlite3.Row]:
        """Run one statement, which is one transaction, on this thread's connection and return its rows."""
        try:
            if not hasattr(self._local, "connection"):
                self._local.connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
                self._local.connection.row_factory = sqlite3.Row
                self._local.connection.execute("PRAGMA synchronous = NORMAL")
            rows: Sequence[sqlite3.Row] = self._local.connection.execute(sql, values).fetchall()
            return rows
        except sqlite3.Error as error:
            raise OutputError(
                f"the job queue {self.path} cannot be used: {error}. Free disk space, or move that file away."
            ) from None


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    return Job(**values | {"spec": json.loads(values["spec"]), "stopping": bool(values["stopping"])})


def _as_json(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a job's specification holds JSON values and paths, got {value!r}")


def _alive(pid: int) -> bool:
    """Return whether a process of this machine exists."""
    # On Windows signal 0 would end it: there the heartbeat alone decides.
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
