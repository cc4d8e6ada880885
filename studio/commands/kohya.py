"""``studio kohya``."""

from collections.abc import Sequence
from pathlib import Path

from studio.commands import say
from studio.errors import OutputError
from studio.flags import Parser, read_toml
from studio.whole_file import whole_file


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Write a training TOML of kohya's sd-scripts as one for 'studio train --config'."""
    parser.add_argument("file", type=Path, help="kohya's file, of train_network.py --config_file")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="TOML file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    given = parser.parse_args(argv)
    if given.output.exists() and not given.overwrite:
        raise OutputError(f"'{given.output}' exists. Choose another output or give --overwrite.")
    import tomlkit

    from studio.kohya_settings import flat, translated
    from studio.specs import TrainSpec, parse_spec

    settings, left = translated(flat(read_toml(given.file)))
    parse_spec(TrainSpec, settings)
    notes = [f"{name}: {reason}." for name, reason in sorted(left.items())]
    head = [f"# From kohya's {given.file.name}.", *(f"# Not taken over: {note}" for note in notes), ""]
    with whole_file(given.output) as unfinished:
        unfinished.write_text("\n".join(head) + tomlkit.dumps(settings), encoding="utf-8")
    say(*(f"not taken over: {note}" for note in notes))
    print(given.output)
    return 0
