"""Keeps one worker process running beside the page, and ends it with the page."""

import subprocess
import sys
import threading
import time

from studio.workspace import Workspace

LONGEST_PAUSE = 30.0
STEADY_SECONDS = 60.0
SETTLED_SECONDS = 5.0


class Supervisor:
    """Starts the worker, starts it again when it ends, more slowly each time it ends soon.

    The worker holds the other end of a pipe. When the page's process is gone, however it went, the pipe
    closes, and the worker stops its job safely and leaves.
    """

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.log = space.runs / "worker.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._trouble = ""
        self._started = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        """Start the worker and keep it going."""
        self.log.write_bytes(b"")
        self._thread.start()

    def trouble(self) -> str:
        """Return why no work is done at the moment, or an empty string."""
        healthy = self.process is not None and self.process.poll() is None
        return "" if healthy and time.monotonic() - self._started > SETTLED_SECONDS else self._trouble

    def close(self, *, patience: float = 20.0) -> None:
        """Ask the worker to stop its job safely and to leave; end it after ``patience`` seconds."""
        self._closing.set()
        process = self.process
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._thread.join()

    def _keep(self) -> None:
        pause = 0.5
        while not self._closing.is_set():
            self._started = time.monotonic()
            code = self._run_once()
            if self._closing.is_set():
                return
            pause = (
                0.5 if time.monotonic() - self._started > STEADY_SECONDS else min(2 * pause, LONGEST_PAUSE)
            )
            self._trouble = (
                f"The worker ended unexpectedly (code {code}) and starts again. Its log is {self.log}."
            )
            self._closing.wait(pause)

    def _run_once(self) -> int:
        command = [sys.executable, "-P", "-m", "studio.worker", "--attached", "--home", str(self.space.root)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        if self._closing.is_set() and self.process.stdin:
            self.process.stdin.close()
        return self.process.wait()
