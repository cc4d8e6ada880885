"""``studio list``."""

from collections.abc import Sequence

from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """List presets, methods, modifiers, formats, schedulers and base models."""
    from studio.listing import tables

    found = tables()
    parser.add_argument("what", nargs="?", choices=list(found), help="one of these lists [all of them]")
    what = parser.parse_args(argv).what
    for topic, table in found.items():
        if what in (None, topic):
            print(table.title)
            for name, text in table.rows.items():
                print(f"  {name:<18} {text}".rstrip())
    return 0
