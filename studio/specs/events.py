"""What long work tells whoever watches: the command line's progress bar, a Python callback, the page."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Event(BaseModel):
    """One thing that happened.

    Attributes:
        kind: ``report`` (facts before the start, in ``message``), ``progress`` (``step`` of ``total`` with
            ``values`` such as loss and learning_rate), ``sample`` (a picture at ``path`` after ``step``),
            ``picture`` (result ``path``), ``saved`` (an adapter at ``path``), ``message`` (a line for the
            log), ``finished`` (``values`` with the result).
        step: Steps done.
        total: Steps in all.
        part: With ``saved``, which part of the adapter the file holds, by the method's word; empty: the
            adapter's own file, which comes before those of its parts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["report", "progress", "sample", "picture", "saved", "message", "finished"]
    message: str = ""
    step: int = 0
    total: int = 0
    path: Path | None = None
    part: str = ""
    values: dict[str, float] = {}


OnEvent = Callable[[Event], None]


def silent(_: Event) -> None:
    """Take an event that nobody asked for."""
