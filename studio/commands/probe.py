"""``studio probe``."""

from collections.abc import Sequence

from studio.commands import say
from studio.flags import Parser, read_spec_arguments
from studio.specs import ProbeSpec


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Measure what each attention block of a base carries, content or style."""
    parser.usage = "studio probe [options]"
    parser.epilog = "  studio probe --base starter --pairs 24 --output probe/"
    spec, _ = read_spec_arguments(parser, ProbeSpec, argv)
    from studio.progress import Progress

    with Progress("probing", say) as on_event:
        from studio.block_probe.probing import probe as measure

        report = measure(spec, on_event=on_event)
    for line in (*report.lines(), "", report.table, report.grid, report.bars):
        print(line)
    return 0
