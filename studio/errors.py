"""What a user can mend: every error of this module is shown as one message without a traceback.

A message says what happened, what was got, what was wanted and the way out.
"""

from collections.abc import Sequence


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


class OutputError(StudioError):
    """A result cannot be written."""
