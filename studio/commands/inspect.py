"""``studio inspect``."""

from collections.abc import Sequence
from pathlib import Path

from studio.flags import Parser


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Show what an adapter file holds, without loading it."""
    parser.add_argument("file", type=Path, help="a .safetensors file")
    arguments = parser.parse_args(argv)
    from studio.inspection import describe

    for line in describe(arguments.file):
        print(line)
    return 0
