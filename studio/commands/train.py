"""``studio train``."""

from collections.abc import Sequence
from typing import Any

from studio.commands import INTERRUPTED, say
from studio.flags import Parser, read_spec_arguments
from studio.interrupt import SafeStop
from studio.presets import preset
from studio.specs import TrainSpec


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Fit an adapter to a folder of pictures."""
    parser.usage = "studio train [options]"
    parser.epilog = (
        "Ctrl-C stops safely and saves what is there; a second one gives up.\n\n"
        "  studio train --data my_dog/ --prompt 'a photo of sks dog' --output dog.safetensors\n"
        "  studio train --preset subject --data my_dog/ --prompt 'a photo of sks dog' --output a.safetensors"
    )
    parser.add_argument(
        "--preset",
        action="append",
        metavar="NAME",
        help="settings to start from ('studio list presets'); of several the later wins, and --config and "
        "flags win over all",
    )
    spec, _ = read_spec_arguments(parser, TrainSpec, argv, given=_preset_settings(argv))
    from studio.progress import Progress

    with SafeStop() as stop, Progress("training", say) as on_event:
        from studio import api

        result = api.train(spec, on_event=on_event, stop=stop)
    if not result.main:
        return INTERRUPTED if result.stopped else 0
    loss = f", last loss {result.losses[-1]:.4f}" if result.losses else ""
    print(f"{result.path}: {len(result.losses)} of {spec.steps} steps in {result.seconds:.0f} s{loss}")
    return INTERRUPTED if result.stopped else 0


def _preset_settings(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(add_help=False)
    parser.add_argument("--preset", action="append", default=[])
    return preset(*parser.parse_known_args(argv)[0].preset)
