"""``studio caption``."""

from collections.abc import Sequence
from pathlib import Path

from studio.commands import INTERRUPTED, say
from studio.flags import Parser
from studio.interrupt import SafeStop


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Write captions beside pictures that have none, with an image-to-text model."""
    parser.epilog = "  studio caption my_dog/ --model Salesforce/blip-image-captioning-base"
    parser.add_argument("folder", type=Path, help="the pictures, flat or in kohya's N_name folders")
    parser.add_argument("--model", required=True, metavar="NAME", help="folder or hub id, such as of BLIP")
    parser.add_argument("--prompt", metavar="TEXT", help="how captions begin, or what to ask a chat model")
    parser.add_argument("--extension", default=".txt", metavar="TEXT", help="of the captions [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=60, metavar="N", help="length [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="also write those that are there already")
    parser.add_argument(
        "--device", default="auto", metavar="TEXT", help="'auto', 'cpu', 'cuda' [%(default)s]"
    )
    arguments = vars(parser.parse_args(argv))
    from studio.progress import Progress

    with SafeStop() as stop, Progress("captioning", say) as on_event:
        from studio.data.captioner import caption_folder

        folder, model = arguments.pop("folder"), arguments.pop("model")
        result = caption_folder(folder, model, **arguments, on_event=on_event, stop=stop)
    for path in result.written:
        print(path)
    say(f"{len(result.written)} captions written, {len(result.kept)} kept", *result.failed)
    return INTERRUPTED if result.stopped else int(bool(result.failed))
