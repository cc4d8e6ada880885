"""``studio convert``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from studio.commands import say
from studio.errors import UsageError
from studio.flags import Parser
from studio.registry import FORMATS

_OPTIONS = ("base", "precision", "any_base", "reference")


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Write an adapter for other tools: another format, low-rank, or merged into its base."""
    parser.add_argument("file", type=Path, help="the adapter to read")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="PATH", help="adapter file to write")
    target.add_argument(
        "--into-base", type=Path, metavar="FOLDER", help="diffusers folder to write, base and adapter merged"
    )
    parser.add_argument("--format", metavar="NAME", help="of the file to write [diffusers, kohya if dense]")
    parser.add_argument("--base", default="starter", help="base model it was trained on [%(default)s]")
    parser.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), help="number type to write [depends on the changes]"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="approximate every change by this rank; says what is lost"
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="write every entry of every change (.diff), for tools that do not load its kind, such as DoRA; "
        "large, and --base must be the one it was trained on",
    )
    for flag, text in (
        ("--any-base", "take an adapter that names another base"),
        ("--reference", "the file is an unet.pt of SaRA's reference program; --base must be its base"),
        ("--overwrite", "replace the output file"),
    ):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)
    given = parser.parse_args(argv)
    form = given.format or ("kohya" if given.dense else "diffusers")
    common = {key: getattr(given, key) for key in _OPTIONS}
    FORMATS[form]
    if given.into_base:
        if given.format or given.rank is not None or given.dense or given.overwrite:
            raise UsageError(
                "--into-base writes a whole new model. Leave out --format, --rank, --dense, --overwrite."
            )
        from studio.conversion import merge_into_base

        print(merge_into_base(given.file, given.into_base, **common))
        return 0
    from studio.inspection import refuse_existing

    refuse_existing(given.output, overwrite=given.overwrite)
    from studio.conversion import convert_file

    own = {key: getattr(given, key) for key in ("rank", "dense", "overwrite")}
    print(convert_file(given.file, given.output, format=form, say=say, **own, **common))
    return 0
