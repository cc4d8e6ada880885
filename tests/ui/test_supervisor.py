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
    supervisor.close(patience=0)


def test_a_worker_that_dies_is_started_again_and_goes_with_the_page(supervisor: Supervisor) -> None:
    first = supervisor.process
    assert first is not None
    assert supervisor.trouble() == ""
    first.kill()
    wait_for(lambda: supervisor.process is not first)
    assert "ended unexpectedly (code -9)" in supervisor.trouble()
    second = supervisor.process
    assert second is not None and second.poll() is None
    supervisor.close(patience=60)
    assert second.poll() == 0
