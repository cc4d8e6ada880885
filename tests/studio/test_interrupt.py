"""Ctrl-C asks first and ends only then, however often a launcher repeats it."""

import os
import signal

import pytest

from studio.interrupt import SafeStop


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_second_ctrl_c_ends_the_work_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with SafeStop() as stop:
        assert not stop()
        interrupt()
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launcher_that_passes_ctrl_c_on_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with SafeStop() as stop:
        interrupt()
        interrupt()
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
