"""What a user can mend: every error of this module is shown as one message without a traceback.

A message says what happened, what was got, what was wanted and the way out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class StudioError(Exception):
    """Something the user can mend; the text is complete without the traceback.

    Attributes:
        exit_code: What the command line returns for it.
    """

    exit_code = 1


class UsageError(StudioError):
    """The command or the specification is malformed: unknown option, method or value."""

    exit_code = 2


class SpecError(UsageError):
    """A specification has problems; all of them are listed, in the user's field names."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class BaseModelError(StudioError):
    """A base model cannot be found, read or used."""


class AdapterError(StudioError):
    """An adapter file cannot be read, or does not fit the base model."""


class DataError(StudioError):
    """The training pictures or captions cannot be used as they are."""


class CompositionError(StudioError):
    """Adapters cannot be composed on this pipeline as asked."""


class BaseNeeded(AdapterError, CompositionError):
    """What adapters do cannot be told without their base, and none was given."""


class TrainingError(StudioError):
    """Training cannot start or go on."""


class Interrupted(TrainingError):
    """Training was asked to stop before it had anything to write; what it has made is kept."""

    exit_code = 130


class OutputError(StudioError):
    """A result cannot be written."""


class MemoryShortage(StudioError):
    """The memory of the GPU or of the machine is not enough."""


_SHORTAGE = re.compile(
    r"out of memory|not enough memory|(can't|cannot) allocate memory|_ALLOC_FAILED", re.IGNORECASE
)
_ON_GPU = re.compile(r"cuda|cublas|cudnn|\bhip\b|\bmps\b|\bxpu\b")
_ASKED = re.compile(r"allocate ([\d.]+) (\w+)")


def memory_shortage(error: BaseException | None) -> str | None:
    """Return what to say of an error that memory which was not enough has caused, None of others.

    PyTorch has an error of its own for CUDA only; elsewhere, and in libraries, the text alone tells.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or (
            not isinstance(error, StudioError) and _SHORTAGE.search(text) is not None
        ):
            whose = "the GPU's" if _ON_GPU.search(text.lower()) else "the machine's"
            if (asked := _ASKED.search(text)) is None:
                return f"{whose} memory is not enough"
            number, unit = asked.groups()
            more = f"{int(number) / 2**30:.3g} GiB" if unit == "bytes" else f"{number} {unit}"
            return f"{whose} memory is not enough: {more} more were asked for"
        error = error.__cause__
    return None


@contextmanager
def memory_told(way_out: Callable[[], str]) -> Iterator[None]:
    """Put one message in the place of an error that too little memory raises in a block.

    Args:
        way_out: Returns sentences that say what takes less.

    Raises:
        MemoryShortage: In its place.
    """
    try:
        yield
    except Exception as error:
        if (what := memory_shortage(error)) is None:
            raise
        raise MemoryShortage(f"{what}. {way_out()}") from error
