"""A progress bar made from events, with messages above it."""

from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm

from studio.specs import Event


class Progress:
    """Shows events on standard error while its context is open.

    Args:
        label: In front of the bar, unless an event has a message of its own.
        say: Prints one line when no bar is shown.
    """

    def __init__(self, label: str, say: Callable[[str], None]) -> None:
        self._label = label
        self._say = say
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "progress":
            self._advance(event)
        elif event.kind in ("report", "message", "saved") and event.message:
            self._write(event.message)
        elif event.kind == "sample" and event.path:
            self._write(f"sample after step {event.step}: {event.path}")
        elif event.kind == "finished":
            self._close()

    def _advance(self, event: Event) -> None:
        label = event.message or self._label
        bar = self._bar
        if bar is None or bar.total != event.total or bar.desc != label or event.step < bar.n:
            self._close()
            bar = self._bar = tqdm(total=event.total, desc=label, dynamic_ncols=True, unit="step")
        bar.update(event.step - bar.n)
        if event.values:
            bar.set_postfix({name: f"{value:.3g}" for name, value in event.values.items()}, refresh=False)

    def _write(self, text: str) -> None:
        if self._bar is None:
            self._say(text)
        else:
            self._bar.clear()
            self._say(text)
            self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
