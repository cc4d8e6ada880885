"""``studio compose``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studio.commands import INTERRUPTED, say
from studio.flags import Parser, read_spec_arguments
from studio.interrupt import SafeStop
from studio.specs import Event
from studio.specs.composing import BakeSpec, CompareSpec, DocumentSpec, PlanSpec, ProfileSpec

_HELP = "; 'studio compose --{} --help' has its options"
_MODES = {
    "plan": ("?", "FILE", "show what acts when in a composition"),
    "compare": (None, "METHOD,METHOD,...", "draw the same pictures by several methods"),
    "bake": ("?", "FILE", "make one ordinary adapter of a composition"),
    "profile": ("?", "FILE", "measure which frequencies adapters bring in, for method 'cmlora'"),
}


def run(parser: Parser, argv: Sequence[str]) -> int:
    """Write compositions of adapters, show their plans, compare methods, make one adapter of all."""
    parser.usage = (
        "studio compose [--plan [FILE] | --compare METHODS | --bake [FILE] | --profile [FILE]] [options]"
    )
    parser.epilog = (
        "  studio compose --from out/0000-1.png --output duo.toml\n"
        "  studio compose --adapter fox.safetensors:0.8 --adapter ink.safetensors --method klora "
        "--output duo.toml\n"
        "  studio compose --plan duo.toml --steps 30 --picture plan.png\n"
        "  studio compose --compare merge,switch,klora --from duo.toml --prompt 'a fox in ink' --seeds 1-4\n"
        "  studio compose --bake duo.toml --max-rank 32 --output one.safetensors\n"
        "  studio compose --profile --adapter fox.safetensors --adapter ink.safetensors"
    )
    early = Parser(add_help=False)
    _add_flags(early, *_MODES)
    named = early.parse_known_args(argv)[0]
    mode = next((name for name in _MODES if getattr(named, name) is not None), None)
    # What a comparison compares is a field of its own, so that a file can name it.
    _add_flags(parser, *([] if mode == "compare" else [mode] if mode else _MODES))
    source = named.source if mode in (None, "compare") else getattr(named, mode) or named.source
    given = {} if {"-h", "--help"} & set(argv) else _settings(source)
    act: dict[str | None, Callable[..., int]] = {
        None: _document,
        "plan": _plan,
        "compare": _compare,
        "bake": _bake,
        "profile": _profile,
    }
    return act[mode](parser, argv, given)


def _add_flags(parser: Parser, *names: str) -> None:
    modes = parser.add_mutually_exclusive_group()
    for name in names:
        count, metavar, text = _MODES[name]
        more = _HELP.format(name) if len(names) > 1 else ""
        modes.add_argument(
            f"--{name}", nargs=count, const="" if count else None, metavar=metavar, help=text + more
        )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="composition (.toml), or picture (.png) whose composition to take; flags win",
    )


def _settings(source: str | Path | None) -> dict[str, Any]:
    if not source:
        return {}
    from studio.composing.document import read_composition

    return read_composition(source).model_dump()


def _document(parser: Parser, argv: Sequence[str], given: dict[str, Any]) -> int:
    spec, _ = read_spec_arguments(parser, DocumentSpec, argv, given=given)
    from studio.composing.document import write_composition

    print(write_composition(spec, spec.output, overwrite=spec.overwrite))
    return 0


def _plan(parser: Parser, argv: Sequence[str], given: dict[str, Any]) -> int:
    spec, _ = read_spec_arguments(parser, PlanSpec, argv, given=given)
    from studio.composing.plan import show_plan

    for line in show_plan(spec, on_event=_said).lines():
        print(line)
    if spec.picture:
        print(spec.picture)
    return 0


def _compare(parser: Parser, argv: Sequence[str], given: dict[str, Any]) -> int:
    if given:
        given["method_options"] = {given.pop("method"): given.pop("options")}
    spec, _ = read_spec_arguments(parser, CompareSpec, argv, given=given)
    from studio.progress import Progress

    with SafeStop() as stop, Progress("comparing", say) as on_event:
        from studio.composing.compare import compare

        report = compare(spec, on_event=on_event, stop=stop)
    for line in (*report.lines(), report.grid, report.table):
        print(line)
    return 0 if len(report.rows) == 1 + len(spec.methods) else INTERRUPTED


def _bake(parser: Parser, argv: Sequence[str], given: dict[str, Any]) -> int:
    spec, _ = read_spec_arguments(parser, BakeSpec, argv, given=given)
    from studio.progress import Progress

    with Progress("baking", say) as on_event:
        from studio.composing.bake import bake

        result = bake(spec, on_event=on_event)
    for line in (*result.lines(), *result.paths):
        print(line)
    return 0


def _profile(parser: Parser, argv: Sequence[str], given: dict[str, Any]) -> int:
    known = {name: value for name, value in given.items() if name in ProfileSpec.model_fields}
    spec, _ = read_spec_arguments(parser, ProfileSpec, argv, given=known)
    from studio.composing.profile import measure_profiles

    for line in measure_profiles(spec, on_event=_said).lines():
        print(line)
    return 0


def _said(event: Event) -> None:
    if event.message:
        say(event.message)
