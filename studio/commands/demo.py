"""``studio demo``."""

from collections.abc import Sequence
from pathlib import Path

from studio.commands import say
from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Train an adapter for a new subject, draw with and without it, and show both."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="where to put the results [%(default)s]",
    )
    arguments = parser.parse_args(argv)
    from studio.progress import Progress

    with Progress("demo", say) as on_event:
        from studio import demo

        report = demo.run(arguments.output, on_event=on_event)
    for line in report.lines():
        print(line)
    return 0
