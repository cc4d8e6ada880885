"""The queue: one worker per job, nothing lost, every end reachable."""

import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from studio.errors import OutputError, UsageError
from studio.jobs import JobStore
from studio.specs import Event

CLAIM_ALL = """
import sys
from studio.jobs import JobStore
store = JobStore(sys.argv[1])
while job := store.claim(sys.argv[2]):
    print(job.id)
    store.finish(job.id, sys.argv[2])
"""


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def progress(step: int) -> Event:
    return Event(kind="progress", step=step, total=10, values={"loss": 1.0 / step})


def test_jobs_are_claimed_in_the_order_of_their_submission(store: JobStore) -> None:
    ids = [store.submit("train", {"steps": number}) for number in range(3)]
    claimed = [store.claim("a") for _ in range(4)]
    assert [job.id if job else None for job in claimed] == [*ids, None]
    assert [job.spec["steps"] for job in claimed if job] == [0, 1, 2]


def test_many_threads_never_claim_the_same_job(store: JobStore) -> None:
    ids = [store.submit("generate", {}) for _ in range(40)]
    claimed: list[int] = []

    def claim_all(name: str) -> None:
        while job := store.claim(name):
            claimed.append(job.id)

    threads = [threading.Thread(target=claim_all, args=(f"worker-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == ids


def test_several_processes_never_claim_the_same_job(store: JobStore) -> None:
    ids = [store.submit("generate", {}) for _ in range(30)]
    command = [sys.executable, "-P", "-c", CLAIM_ALL, str(store.path)]
    workers = [
        subprocess.Popen([*command, f"w{number}"], stdout=subprocess.PIPE, text=True) for number in range(3)
    ]
    claimed = [int(line) for worker in workers for line in worker.communicate()[0].split()]
    assert Counter(claimed) == Counter(ids)
    assert {job.state for job in store.list()} == {"done"}


def test_events_after_a_number_are_only_the_newer_ones(store: JobStore) -> None:
    job, other = store.submit("train", {}), store.submit("train", {})
    for step in (1, 2, 3):
        store.report(job, progress(step))
        store.report(other, progress(step))
    first, second, third = store.events(job)
    assert [reported.event.step for reported in (first, second, third)] == [1, 2, 3]
    assert store.events(job, after=first.number) == [second, third]
    assert store.events(job, after=third.number) == []


def test_a_queued_job_is_cancelled_at_once_and_never_claimed(store: JobStore) -> None:
    job = store.submit("train", {})
    assert store.cancel(job) == "cancelled"
    assert store.claim("a") is None


def test_a_running_job_is_asked_to_stop_and_ends_as_cancelled(store: JobStore) -> None:
    job = store.submit("train", {})
    store.claim("a")
    assert store.heartbeat(job, "a")
    assert store.cancel(job) == "running"
    assert store.get(job).stopping
    assert not store.heartbeat(job, "a")
    assert store.finish(job, "a")
    assert store.get(job).state == "cancelled"
    assert not store.get(job).stopping


def test_a_job_of_a_dead_process_is_interrupted_and_can_be_retried(store: JobStore) -> None:
    job = store.submit("train", {"steps": 5})
    claim_and_die = (
        "import os, sys; from studio.jobs import JobStore; JobStore(sys.argv[1]).claim('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-P", "-c", claim_and_die, str(store.path)], check=False)
    assert store.get(job).state == "running"
    store.report(job, progress(1))
    assert store.claim("b") is None
    lost = store.get(job)
    assert lost.state == "interrupted"
    assert "ended unexpectedly" in lost.message

    again = store.retry(job)
    assert (again.state, again.attempt, again.message, again.spec) == ("queued", 2, "", {"steps": 5})
    assert store.events(job) == []
    claimed = store.claim("b")
    assert claimed is not None and claimed.id == job


def test_a_silent_worker_loses_its_job_and_has_no_say_afterwards(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite", stale_after=-1)
    job = store.submit("train", {})
    store.claim("sleeper")
    assert store.recover() == [job]
    assert "silent" in store.get(job).message
    assert not store.heartbeat(job, "sleeper")
    store.retry(job)
    store.claim("other")
    assert not store.finish(job, "sleeper")
    assert not store.fail(job, "late", "sleeper")
    assert store.get(job).state == "running"


def test_a_living_worker_keeps_its_job(store: JobStore) -> None:
    job = store.submit("train", {})
    store.claim("a")
    assert store.recover() == []
    assert store.get(job).pid == os.getpid()


def test_a_failed_job_keeps_its_message(store: JobStore) -> None:
    job = store.submit("train", {})
    store.claim("a")
    assert store.fail(job, "the folder is empty", "a")
    assert (store.get(job).state, store.get(job).message) == ("failed", "the folder is empty")
    assert not store.finish(job, "a")


def test_done_and_running_jobs_cannot_be_retried(store: JobStore) -> None:
    job = store.submit("train", {})
    store.claim("a")
    with pytest.raises(UsageError, match=f"job {job} is running"):
        store.retry(job)
    store.finish(job, "a")
    with pytest.raises(UsageError, match=f"job {job} is done"):
        store.retry(job)


def test_an_unknown_job_is_named(store: JobStore) -> None:
    for ask in (store.get, store.cancel, store.retry, lambda number: store.report(number, progress(1))):
        with pytest.raises(UsageError, match="there is no job 77"):
            ask(77)


def test_an_unknown_kind_is_refused(store: JobStore) -> None:
    with pytest.raises(UsageError, match="unknown kind of job 'paint'"):
        store.submit("paint", {})  # type: ignore[arg-type]


def test_paths_in_a_specification_become_text(store: JobStore) -> None:
    job = store.submit("train", {"data": Path("pictures")})
    assert store.get(job).spec == {"data": "pictures"}


def test_the_list_is_newest_first_and_filters(store: JobStore) -> None:
    train, draw = store.submit("train", {}), store.submit("generate", {})
    assert [job.id for job in store.list()] == [draw, train]
    assert [job.id for job in store.list(kind="train")] == [train]
    store.claim("a")
    assert [job.id for job in store.list(state="queued")] == [draw]
    assert [job.id for job in store.list(limit=1)] == [draw]


def test_everything_is_there_again_when_the_file_is_opened_anew(store: JobStore) -> None:
    job = store.submit("train", {"prompt": "a dog"})
    store.claim("a")
    store.report(job, progress(4))
    again = JobStore(store.path)
    assert again.get(job) == store.get(job)
    assert again.events(job) == store.events(job)


def test_a_file_that_is_no_queue_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_text("not a database, and long enough to be read as one " * 40)
    with pytest.raises(OutputError, match=r"job queue .*jobs\.sqlite cannot be used"):
        JobStore(path)


def test_the_queue_writes_ahead_so_that_readers_do_not_wait(store: JobStore) -> None:
    assert sqlite3.connect(store.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
