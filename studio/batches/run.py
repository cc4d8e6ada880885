"""Draw pictures of many prompts or along axes into a folder, by one process or several; go on later."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from studio.batches.drawing import Failed, draw_wanted, grouped, missing
from studio.batches.grid import SHEET, lay_out
from studio.batches.lines import Wanted, read_lines, shared_settings, wanted_pictures
from studio.batches.manifest import NAME, Manifest
from studio.batches.plans import planning_problems
from studio.drawing import Result, check_writable
from studio.errors import CompositionError, SpecError, StudioError
from studio.generation import Stopped
from studio.models.device import resolve_device
from studio.png import NOT_OF_THE_PICTURE, read_spec
from studio.specs import BatchSpec, Event, GridSpec, OnEvent
from studio.specs.events import silent
from studio.trainers.processes import Processes, join
from studio.whole_file import whole_file

S = TypeVar("S", BatchSpec, GridSpec)


@dataclass(frozen=True)
class BatchResult:
    """What a batch left.

    Attributes:
        manifest: File that lists the pictures.
        wanted: How many pictures were asked for.
        drawn: How many of them were drawn, by all processes.
        kept: How many were there already.
        left_out: What was wrong with the lines that were left out.
        stopped: Whether it was asked to stop before its end.
        main: Whether this is the first of the processes, or the only one.
        grid: Picture of all, of a grid that is complete.
    """

    manifest: Path
    wanted: int
    drawn: int
    kept: int
    left_out: tuple[str, ...]
    stopped: bool
    main: bool
    grid: Path | None = None


def draw_batch(
    spec: BatchSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> BatchResult:
    """Draw the pictures of every prompt with every seed that are not there yet.

    Each is written at once as ``<line>-<seed>.png`` and listed in ``manifest.jsonl``, so whatever ends a run,
    the same one goes on. Of several processes, such as accelerate's launcher starts, each draws a share.

    Args:
        spec: The request.
        on_event: Told of lines that are left out, of progress and of each written picture.
        stop: Asked between denoising steps; what is finished by then stays.

    Raises:
        SpecError: If a line is wrong; lists all of them.
        OutputError: If a picture is there with other settings, or cannot be written.
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
    """
    tell = on_event or silent
    processes = join(resolve_device(spec.device))
    with processes.together():
        spec = _placed(spec, processes)
        pictures, problems = wanted_pictures(read_lines(spec.prompts), shared_settings(spec), spec.seeds)
        if problems and not spec.skip_bad:
            raise SpecError(
                [f"'{spec.prompts}':", *problems, "Mend the lines, or leave them out with --skip-bad."]
            )
        if processes.main:
            for problem in problems:
                tell(Event(kind="message", message=f"left out, {problem}"))

    def failed(those: Sequence[Wanted], error: StudioError) -> None:
        numbers = sorted({each.number for each in those})
        if numbers == sorted({each.number for each in pictures}):
            raise error
        problem = f"line {', '.join(map(str, numbers))}: {error}"
        if not spec.skip_bad:
            error.args = (f"{problem} Mend it, or leave it out with --skip-bad.",)
            raise error
        problems.append(problem)
        tell(Event(kind="message", message=f"left out, {problem}"))

    result = _drawn(pictures, spec, processes, tell, stop, failed)
    return replace(result, left_out=tuple(problems))


def draw_grid(
    spec: GridSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> BatchResult:
    """Draw the pictures of a grid that are not there yet, and one picture of all, ``grid.png``.

    As ``draw_batch``; each picture is ``<place in the grid>-<seed>.png``, row by row.

    Args:
        spec: The request.
        on_event: Told of progress and of each written picture.
        stop: Asked between denoising steps; what is finished by then stays.

    Raises:
        SpecError: If an axis or one of its values is wrong; lists all of them.
        CompositionError: If a picture cannot be drawn as it is composed.
        OutputError: If a picture is there with other settings, or cannot be written.
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
    """
    processes = join(resolve_device(spec.device))
    path = spec.output / SHEET
    with processes.together():
        spec = _placed(spec, processes)
        grid = lay_out(spec)
        _check_cells(grid.pictures)
        if processes.main and not (spec.output / NAME).exists():
            check_writable(path, overwrite=spec.overwrite)
    result = _drawn(grid.pictures, spec, processes, on_event or silent, stop)
    if result.stopped or not result.main:
        return result
    with whole_file(path) as unfinished:
        grid.sheet().save(unfinished, format="PNG", optimize=True)
    return replace(result, grid=path)


def _check_cells(pictures: Sequence[Wanted]) -> None:
    """Refuse a grid of which a picture cannot be drawn as it is composed, before any is.

    Raises:
        CompositionError: If so; names the first picture of each reason.
    """
    reasons: dict[str, Wanted] = {}
    for place, problem in planning_problems([each.spec for each in pictures]).items():
        reasons.setdefault(problem, pictures[place])
    if reasons:
        told = [f"{', '.join(each.about.values())}: {problem}" for problem, each in reasons.items()]
        raise CompositionError(" ".join(told))


def _placed(spec: S, processes: Processes) -> S:
    """Return the request with this process's own device."""
    place = processes.own(resolve_device(spec.device), asked=spec.device)
    return spec.model_copy(update={"device": str(place)}) if processes.count > 1 else spec


def _drawn(
    pictures: Sequence[Wanted],
    spec: BatchSpec | GridSpec,
    processes: Processes,
    tell: OnEvent,
    stop: Callable[[], bool] | None,
    failed: Failed | None = None,
) -> BatchResult:
    """Draw this process's share of the pictures that are not there yet."""
    # What is missing is decided once: the others may be drawing already when a process looks.
    with processes.together():
        found = missing(pictures, overwrite=spec.overwrite) if processes.main else []
        names = processes.main_says({each.path.name for each in found})
        todo = [each for each in pictures if each.path.name in names]
    stopped, drawn = False, 0
    with processes.together():
        manifest = Manifest(spec.output)
        if processes.main:
            for each in pictures:
                if each.path.name not in names:
                    manifest.add(each.path, entry(each))
        mine = share(todo, processes, batch_size=spec.batch_size)
        try:
            for _ in written(mine, manifest, batch_size=spec.batch_size, tell=tell, stop=stop, failed=failed):
                drawn += 1
        except Stopped:
            stopped = True
    with processes.together():
        stopped = processes.any(stopped)
        drawn = round(processes.total(drawn))
        if processes.main:
            manifest.settle()
    kept = len(pictures) - len(todo)
    return BatchResult(manifest.path, len(pictures), drawn, kept, (), stopped, processes.main)


def share(todo: Sequence[Wanted], processes: Processes, *, batch_size: int) -> list[Wanted]:
    """Return those pictures that this process draws: of every so many batches one."""
    batches = [
        places[start : start + batch_size]
        for places in grouped(todo)
        for start in range(0, len(places), batch_size)
    ]
    return [todo[place] for batch in batches[processes.index :: processes.count] for place in batch]


def written(
    wanted: Sequence[Wanted],
    manifest: Manifest,
    *,
    batch_size: int,
    tell: OnEvent,
    stop: Callable[[], bool] | None = None,
    failed: Failed | None = None,
) -> Iterator[Result]:
    """Yield pictures as they are drawn, each written and listed; see ``draw_wanted``.

    Raises:
        Stopped: If told to.
    """
    pictures = draw_wanted(wanted, batch_size=batch_size, write=True, tell=tell, stop=stop, failed=failed)
    for place, result in pictures:
        manifest.add(wanted[place].path, entry(wanted[place]))
        yield result


def entry(wanted: Wanted) -> dict[str, Any]:
    """Return what the manifest says of a picture that is there: who wants it, and all that makes it again."""
    spec = read_spec(wanted.path)
    settings = spec.model_dump(mode="json", exclude={*NOT_OF_THE_PICTURE, "prompt", "seed"})
    return {
        **wanted.about,
        "prompt": spec.prompt,
        "seed": spec.seed,
        "settings": settings,
        "hashes": spec.expected_hashes,
    }
