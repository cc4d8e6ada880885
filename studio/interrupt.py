"""Ctrl-C as a wish to stop: the first one asks the work to end safely, the second one ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class SafeStop:
    """Says whether a stop was asked for; a context, in which Ctrl-C and termination ask.

    Example:
        ``with SafeStop() as stop: studio.train(spec, stop=stop)``
    """

    def __init__(self) -> None:
        self._asked = False
        # One that a launcher started gets Ctrl-C twice: from the terminal, and passed on.
        self._echoes = int("LOCAL_RANK" in os.environ)
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether to stop."""
        return self._asked

    def __enter__(self) -> Self:
        # Only the main thread may receive signals; elsewhere nothing asks.
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked and not self._echoes:
            raise KeyboardInterrupt
        self._echoes -= int(self._asked)
        self._asked = True
