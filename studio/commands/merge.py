"""``studio merge``."""

from collections.abc import Sequence
from itertools import takewhile

from studio.commands import say
from studio.flags import Parser, read_spec_arguments
from studio.specs import MergeSpec


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Merge adapters into one ordinary adapter; says what gets lost, before anything is written."""
    parser.usage = "studio merge FILE[:WEIGHT] ... [options]"
    parser.epilog = (
        "  studio merge dog.safetensors:0.8 style.safetensors --how svd --rank 16 --output both.safetensors"
    )
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    spec, _ = read_spec_arguments(
        parser, MergeSpec, [*(f"--adapter={file}" for file in files), *argv[len(files) :]]
    )
    from studio.progress import Progress

    with Progress("merging", say) as on_event:
        from studio.merging.merge import merge

        result = merge(spec, on_event=on_event)
    for line in (*result.report.lines(), *result.paths):
        print(line)
    return 0
