"""The commands of ``studio``: a module for each, with a function ``run`` whose docstring is the help text.

``run(parser, argv)`` adds the command's own flags to the parser, does the work and returns the exit code.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from studio.errors import Interrupted
from studio.flags import Parser

Command = Callable[[Parser, Sequence[str]], int]
INTERRUPTED = Interrupted.exit_code
"""Exit code of what was stopped before its end."""
NAMES = (
    "train",
    "generate",
    "compose",
    "caption",
    "ui",
    "demo",
    "inspect",
    "convert",
    "kohya",
    "merge",
    "zip",
    "probe",
    "jobs",
    "list",
    "doctor",
)
"""In the order in which the help text shows them."""


def command(name: str) -> Command:
    """Return a command, importing its module only."""
    run: Command = import_module(f"{__name__}.{name}").run
    return run


def say(*lines: str) -> None:
    """Print lines for the person who watches; results go to standard output instead."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)
