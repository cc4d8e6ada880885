"""The page keeps a worker going and takes it along when it ends."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from studio.ui.supervisor import Supervisor
from studio.workspace import workspace


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(workspace(tmp_path / "home"))
    supervisor.start()
    wait_for(lambda: supervisor.process)
    yield supervisor
    supervisor.close(patience=0.5)


def test_a_worker_that_dies_is_started_again_and_the_page_says_so(supervisor: Supervisor) -> None:
    first = supervisor.process
    assert first is not None
    first.kill()
    wait_for(lambda: supervisor.process is not first)
    assert "ended unexpectedly (code -9)" in supervisor.trouble()
    assert supervisor.process is not None and supervisor.process.poll() is None


def test_closing_takes_the_worker_along(tmp_path: Path) -> None:
    supervisor = Supervisor(workspace(tmp_path / "home"))
    supervisor.start()
    wait_for(lambda: supervisor.process)
    process = supervisor.process
    assert process is not None
    assert supervisor.trouble() == ""
    supervisor.close(patience=30)
    assert process.poll() is not None
