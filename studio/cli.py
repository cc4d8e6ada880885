"""The ``studio`` command. Commands that do no model work import no torch, so they answer at once."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from studio import __version__
from studio.errors import StudioError, UsageError
from studio.flags import Parser, read_spec_arguments
from studio.interrupt import SafeStop
from studio.presets import preset
from studio.registry import FORMATS, nearest
from studio.specs import GenerateSpec, MergeSpec, ProbeSpec, TrainSpec

Command = Callable[[Parser, Sequence[str]], int]
INTERRUPTED = 130
_CONVERT = ("base", "precision", "any_base", "reference")


def train(parser: Parser, argv: Sequence[str]) -> int:
    """Fit an adapter to a folder of pictures."""
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


def generate(parser: Parser, argv: Sequence[str]) -> int:
    """Draw pictures of a prompt, with or without adapters."""
    parser.epilog = (
        "  studio generate --prompt 'a photo of sks dog' --adapter dog.safetensors:0.8 --seed 1 --count 4\n"
        "  studio generate --from out/0000-1.png --output again/"
    )
    parser.add_argument(
        "--from", dest="picture", type=Path, metavar="PNG", help="picture whose settings to take; flags win"
    )
    given = _picture_settings(argv)
    spec, _ = read_spec_arguments(parser, GenerateSpec, argv, given=given)
    from studio.progress import Progress

    with SafeStop() as stop, Progress("drawing", say) as on_event:
        from studio import api

        results = api.generate(spec, on_event=on_event, stop=stop)
    for result in results:
        print(result.path)
    return INTERRUPTED if len(results) < spec.count else 0


def probe(parser: Parser, argv: Sequence[str]) -> int:
    """Measure what each attention block of a base carries, content or style."""
    parser.epilog = "  studio probe --base starter --pairs 24 --output probe/"
    spec, _ = read_spec_arguments(parser, ProbeSpec, argv)
    from studio.progress import Progress

    with Progress("probing", say) as on_event:
        from studio.block_probe.probing import probe as measure

        report = measure(spec, on_event=on_event)
    for line in (*report.lines(), "", report.table, report.grid, report.bars):
        print(line)
    return 0


def caption(parser: Parser, argv: Sequence[str]) -> int:
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


def ui(parser: Parser, argv: Sequence[str]) -> int:
    """Serve the page."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to listen on [%(default)s]")
    parser.add_argument("--open", action="store_true", help="show the page in your browser")
    parser.add_argument("--home", type=Path, metavar="FOLDER", help="workspace [STUDIO_HOME or ~/.studio]")
    arguments = parser.parse_args(argv)
    from studio.ui.app import serve

    serve(
        arguments.host,
        arguments.port,
        arguments.open,
        arguments.home,
        on_ready=lambda address: print(f"The page is at {address}. Ctrl-C ends it.", flush=True),
    )
    return 0


def doctor(parser: Parser, argv: Sequence[str]) -> int:
    """Show versions, devices and folders, what is wrong and how to mend it."""
    parser.parse_args(argv)
    from studio.doctor import examine

    marks = {"ok": "  ", "none": "- ", "warn": "! ", "bad": "X "}
    bad = 0
    for finding in examine():
        print(f"{marks[finding.state]}{finding.name:<18} {finding.text}", flush=True)
        if finding.remedy:
            print(f"  {'':<18} mend: {finding.remedy}")
        bad += finding.state == "bad"
    print("everything needed is there" if not bad else f"{bad} thing{'s' * (bad > 1)} to mend, marked X")
    return 1 if bad else 0


def show_names(parser: Parser, argv: Sequence[str]) -> int:
    """List presets, methods, formats, schedulers and base models."""
    from studio.listing import tables

    found = tables()
    parser.add_argument("what", nargs="?", choices=list(found), help="one of these lists [all of them]")
    what = parser.parse_args(argv).what
    for topic, table in found.items():
        if what in (None, topic):
            print(table.title)
            for name, text in table.rows.items():
                print(f"  {name:<18} {text}".rstrip())
    return 0


def inspect(parser: Parser, argv: Sequence[str]) -> int:
    """Show what an adapter file holds, without loading it."""
    parser.add_argument("file", type=Path, help="a .safetensors file")
    arguments = parser.parse_args(argv)
    from studio.inspection import describe

    for line in describe(arguments.file):
        print(line)
    return 0


def convert(parser: Parser, argv: Sequence[str]) -> int:
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
    common = {key: getattr(given, key) for key in _CONVERT}
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


def merge(parser: Parser, argv: Sequence[str]) -> int:
    """Merge adapters into one ordinary adapter; says what gets lost, before anything is written."""
    parser.epilog = (
        "  studio merge dog.safetensors:0.8 style.safetensors --how svd --rank 16 --output both.safetensors"
    )
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    spec, _ = read_spec_arguments(
        parser, MergeSpec, [*(f"--adapter={file}" for file in files), *argv[len(files) :]]
    )
    from studio.progress import Progress

    with Progress("merging", say) as on_event:
        from studio.merging.merge import merge as run

        result = run(spec, on_event=on_event)
    for line in (*result.report.lines(), *result.paths):
        print(line)
    return 0


def jobs(parser: Parser, argv: Sequence[str]) -> int:
    """List the page's jobs, cancel one or try one again."""
    parser.add_argument("action", nargs="?", choices=["list", "cancel", "retry"], default="list")
    parser.add_argument("job", nargs="?", type=int, help="number of the job to cancel or retry")
    arguments = parser.parse_args(argv)
    from studio.jobs import JobStore, workspace

    store = JobStore(workspace().database)
    if arguments.action == "list":
        _print_jobs(store.list())
        return 0
    if arguments.job is None:
        raise UsageError(f"which job? studio jobs {arguments.action} NUMBER; `studio jobs` lists them.")
    state = store.cancel(arguments.job) if arguments.action == "cancel" else store.retry(arguments.job).state
    print(f"job {arguments.job}: {'stopping' if state == 'running' else state}")
    return 0


def demo(parser: Parser, argv: Sequence[str]) -> int:
    """Train an adapter for a new subject, draw with and without it, and show both."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="where to put the results [%(default)s]",
    )
    arguments = parser.parse_args(argv)
    from studio.progress import Progress

    with Progress("demo", say) as on_event:
        from studio.demo import run

        report = run(arguments.output, on_event=on_event)
    for line in report.lines():
        print(line)
    return 0


COMMANDS: dict[str, Command] = {
    "train": train,
    "generate": generate,
    "caption": caption,
    "ui": ui,
    "demo": demo,
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "probe": probe,
    "jobs": jobs,
    "list": show_names,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except StudioError as error:
        if debug:
            traceback.print_exc()
        lines = str(error).splitlines() or [type(error).__name__]
        say(f"error: {lines[0]}", *(f"       {line}" for line in lines[1:]))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1


def say(*lines: str) -> None:
    """Print lines for the person who watches; results go to standard output instead."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"diffusion-studio {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command '{name}'.{nearest(name, list(COMMANDS))} Commands: {', '.join(COMMANDS)}."
        )
    command = COMMANDS[name]
    parser = Parser(prog=f"studio {name}", description=command.__doc__)
    if command in (train, generate, probe):
        parser.usage = f"studio {name} [options]"
    if command is merge:
        parser.usage = f"studio {name} FILE[:WEIGHT] ... [options]"
    try:
        return command(parser, rest)
    except SystemExit as end:
        return int(end.code or 0)


def _overview() -> str:
    rows = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    usage = "usage: studio COMMAND [options]      studio COMMAND --help      studio --version"
    return "\n".join([usage, "", *rows, "", "--debug shows where an error came from."])


def _preset_settings(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(add_help=False)
    parser.add_argument("--preset", action="append", default=[])
    return preset(*parser.parse_known_args(argv)[0].preset)


def _picture_settings(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(add_help=False)
    parser.add_argument("--from", dest="picture", type=Path)
    picture = parser.parse_known_args(argv)[0].picture
    if picture is None or {"-h", "--help"} & set(argv):
        return {}
    from studio.png import read_spec

    return read_spec(picture).model_dump()


def _print_jobs(rows: Sequence[Any]) -> None:
    from datetime import datetime

    if not rows:
        print("no jobs yet; the page (studio ui) makes them")
    for job in rows:
        when = datetime.fromtimestamp(job.submitted).strftime("%Y-%m-%d %H:%M")
        what = job.message or job.spec.get("prompt") or ""
        print(f"{job.id:>5}  {job.kind:<9} {job.state:<12} {when}  {what}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
