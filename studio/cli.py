"""The ``studio`` command. Commands that do no model work import no torch, so they answer at once."""

import os
import sys
import traceback
from collections.abc import Sequence

from studio import __version__
from studio.commands import INTERRUPTED, NAMES, command, say
from studio.errors import Interrupted, StudioError, UsageError, memory_shortage
from studio.flags import Parser
from studio.registry import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except Interrupted as error:
        say(str(error))
        return error.exit_code
    except StudioError as error:
        if debug:
            traceback.print_exc()
        lines = str(error).splitlines() or [type(error).__name__]
        say(f"error: {lines[0]}", *(f"       {line}" for line in lines[1:]))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    except Exception as error:
        if (what := memory_shortage(error)) is None:
            raise
        if debug:
            traceback.print_exc()
        say(f"error: {what}. Ask for less at once, or close other programs.")
        return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"diffusion-studio {__version__}")
        return 0
    name, *rest = words
    if name not in NAMES:
        raise UsageError(
            f"unknown command '{name}'.{nearest(name, list(NAMES))} Commands: {', '.join(NAMES)}."
        )
    run = command(name)
    try:
        return run(Parser(prog=f"studio {name}", description=run.__doc__), rest)
    except SystemExit as end:
        return int(end.code or 0)


def _overview() -> str:
    rows = [f"  {name:<10} {(command(name).__doc__ or '').splitlines()[0]}" for name in NAMES]
    usage = "usage: studio COMMAND [options]      studio COMMAND --help      studio --version"
    return "\n".join([usage, "", *rows, "", "--debug shows where an error came from."])


if __name__ == "__main__":
    sys.exit(main())
