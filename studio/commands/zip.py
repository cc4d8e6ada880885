"""``studio zip``."""

from collections.abc import Sequence
from itertools import takewhile

from studio.commands import INTERRUPTED, say
from studio.flags import Parser, read_spec_arguments
from studio.specs import ZipSpec


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Learn one adapter from a content's and a style's that answers like each of them (ZipLoRA)."""
    parser.usage = "studio zip CONTENT[:WEIGHT] STYLE[:WEIGHT] [options]"
    parser.epilog = (
        "Ctrl-C stops safely and saves what is there; a second one gives up.\n\n"
        "  studio zip dog.safetensors ink.safetensors --content-prompt 'a photo of sks dog'\n"
        "      --style-prompt 'a house in ink style' --output both.safetensors"
    )
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    flags = [f"--{side}={file}" for side, file in zip(("content", "style"), files, strict=False)]
    spec, _ = read_spec_arguments(parser, ZipSpec, [*flags, *files[2:], *argv[len(files) :]])
    from studio.interrupt import SafeStop
    from studio.progress import Progress

    with SafeStop() as stop, Progress("zipping", say) as on_event:
        from studio.merging.zip import zip_adapters

        result = zip_adapters(spec, on_event=on_event, stop=stop)
    loss = f", last loss {result.losses[-1]:.4f}" if result.losses else ""
    print(
        f"{result.paths[0]}: {len(result.losses)} of {spec.steps} steps in {result.seconds:.0f} s{loss}, "
        f"overlap {result.overlap:.2f} (1 at first)"
    )
    for path in result.paths[1:]:
        print(path)
    return INTERRUPTED if result.stopped else 0
