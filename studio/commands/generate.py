"""``studio generate``."""

from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studio.commands import INTERRUPTED, say
from studio.errors import UsageError
from studio.flags import Parser, read_spec_arguments, read_toml
from studio.interrupt import SafeStop
from studio.specs import BatchSpec, GenerateSpec, GridSpec

_KINDS: dict[str, type[BatchSpec] | type[GridSpec]] = {
    "prompts": BatchSpec,
    "x": GridSpec,
    "y": GridSpec,
    "z": GridSpec,
}


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Draw pictures of a prompt, with or without adapters."""
    parser.usage = "studio generate [options]"
    parser.epilog = (
        "  studio generate --prompt 'a photo of sks dog' --adapter dog.safetensors:0.8 --seed 1 --count 4\n"
        "  studio generate --from out/0000-1.png --output again/\n"
        "  studio generate --prompts prompts.txt --seeds 1-16 --batch 8 --output out/\n"
        "  studio generate --prompt 'a fox' --x seed=1-4 --y method=merge,switch --output grid/\n"
        "  studio generate --prompt 'a fox in ink' --composition duo.toml --with cache:interval=3"
    )
    parser.add_argument(
        "--from", dest="picture", type=Path, metavar="PNG", help="picture whose settings to take; flags win"
    )
    parser.add_argument(
        "--composition",
        type=Path,
        metavar="TOML",
        help="composition to draw with (studio compose); wins over --from, and --config and flags over both",
    )
    given = _given_settings(argv)
    if kind := _kind(argv):
        return _folder(kind, parser, argv, given)
    parser.add_argument("--prompts", metavar="FILE", help="draw each of its lines; see --prompts FILE --help")
    parser.add_argument(
        "--x", "--y", "--z", metavar="FIELD=VALUES", help="draw a grid; see --x FIELD=VALUES --help"
    )
    spec, _ = read_spec_arguments(parser, GenerateSpec, argv, given=given)
    from studio.progress import Progress

    with SafeStop() as stop, Progress("drawing", say) as on_event:
        from studio import api

        results = api.generate(spec, on_event=on_event, stop=stop)
    if results and (cost := results[-1].cost):
        kept = f"; {cost.cached_share:.0%} of the evaluations from kept features" if cost.cached_share else ""
        say(f"denoiser: {cost.total / 1e9:.3g} GMACs a picture, {cost.ratio:.2f} x the base's{kept}")
    for result in results:
        print(result.path)
    return INTERRUPTED if len(results) < spec.count else 0


def _kind(argv: Sequence[str]) -> type[BatchSpec] | type[GridSpec] | None:
    """Return what is asked for beside pictures of one prompt: those of many, or a grid."""
    parser = Parser(add_help=False)
    for name in _KINDS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--prompt")
    named = parser.parse_known_args(argv)[0]
    settings = read_toml(named.config) if named.config is not None else {}
    asked = [name for name in _KINDS if getattr(named, name) or name in settings]
    if "prompts" in asked and len(asked) > 1:
        raise UsageError(
            f"--prompts draws a file of prompts, --{asked[1]} a grid. Give one of the two; a grid of several "
            "prompts is --x prompt='a fox','a cat'."
        )
    if "prompts" in asked and named.prompt is not None:
        raise UsageError(
            "--prompts takes each line of a file for a prompt, so there is no --prompt beside it. Give one "
            "of the two."
        )
    return _KINDS[asked[0]] if asked else None


def _folder(
    kind: type[BatchSpec] | type[GridSpec], parser: Parser, argv: Sequence[str], given: dict[str, Any]
) -> int:
    """Draw the pictures of a file of prompts, or of a grid."""
    parser.add_argument(
        "--batch", dest="batch_size", default=SUPPRESS, metavar="N", help="the same as --batch-size"
    )
    known = {name: value for name, value in given.items() if name in kind.model_fields}
    spec, _ = read_spec_arguments(parser, kind, argv, given=known)
    from studio.progress import Progress

    with SafeStop() as stop, Progress("drawing", say) as on_event:
        from studio import api

        draw: Any = api.draw_grid if isinstance(spec, GridSpec) else api.draw_batch
        result = draw(spec, on_event=on_event, stop=stop)
    if result.main:
        left_out = f", {len(result.left_out)} problems in lines left out" if result.left_out else ""
        say(f"{result.drawn} of {result.wanted} pictures drawn, {result.kept} were there{left_out}")
        print(result.grid or result.manifest)
    return INTERRUPTED if result.stopped else 0


def _given_settings(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the picture and the composition that are named."""
    parser = Parser(add_help=False)
    parser.add_argument("--from", dest="picture", type=Path)
    parser.add_argument("--composition", type=Path)
    named = parser.parse_known_args(argv)[0]
    settings: dict[str, Any] = {}
    if {"-h", "--help"} & set(argv):
        return settings
    if named.picture is not None:
        from studio.png import read_spec

        settings |= read_spec(named.picture).model_dump()
    if named.composition is not None:
        from studio.composing.document import read_composition

        settings |= read_composition(named.composition).model_dump()
    return settings
