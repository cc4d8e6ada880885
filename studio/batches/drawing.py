"""Draw pictures whose settings differ: those that share them together, and none that is there already."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from studio.adapters.header import tensor_hash
from studio.batches.lines import Wanted
from studio.drawing import Result, check_writable, draw_all
from studio.errors import OutputError, StudioError
from studio.png import NOT_OF_THE_PICTURE, read_spec
from studio.specs import Event, GenerateSpec, OnEvent

Failed = Callable[[Sequence[Wanted], StudioError], None]
"""Told of pictures that cannot be drawn, and why; goes on, or raises."""
_OF_EACH = frozenset({"prompt", "seed"})
_SHOWN = 3  # changed pictures in a message


def grouped(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Return the places of what can be drawn together, those of one base one after the other."""
    groups: dict[str, list[int]] = {}
    for place, each in enumerate(wanted):
        groups.setdefault(json.dumps(each.spec.model_dump(mode="json", exclude=set(_OF_EACH))), []).append(
            place
        )
    bases = list(dict.fromkeys(each.spec.base for each in wanted))
    return sorted(groups.values(), key=lambda places: bases.index(wanted[places[0]].spec.base))


def draw_wanted(
    wanted: Sequence[Wanted],
    *,
    batch_size: int,
    write: bool,
    tell: OnEvent,
    stop: Callable[[], bool] | None = None,
    failed: Failed | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield the place and the picture of each, group by group.

    Args:
        wanted: What to draw.
        batch_size: The most pictures to draw at once.
        write: Whether each goes to its path.
        tell: Told of progress in denoising steps with the pictures per second, and of each written picture.
        stop: Asked between denoising steps.
        failed: Told of what its adapters, composition or prompt do not let be drawn, and why; the others are
            drawn unless it raises. By default that is raised.

    Raises:
        Stopped: If told to.
    """
    meter = _Meter(sum(each.spec.steps for each in wanted), len(wanted), tell)
    for places in grouped(wanted):
        members = [wanted[place] for place in places]
        paths = [each.path for each in members] if write else []
        specs = [each.spec for each in members]

        def report(which: Sequence[int], error: StudioError, members: list[Wanted] = members) -> None:
            if failed is None:
                raise error
            failed([members[place] for place in which], error)

        pictures = draw_all(specs, batch_size=batch_size, paths=paths, tell=meter, stop=stop, failed=report)
        for place, result in pictures:
            meter.count()
            yield places[place], result
        meter.close_group(sum(spec.steps for spec in specs))


def missing(wanted: Sequence[Wanted], *, overwrite: bool) -> list[Wanted]:
    """Return what is to be drawn: what is not there, and with ``overwrite`` what has other settings there.

    Raises:
        OutputError: If something is there that would be another picture now, or cannot be written.
    """
    found, changed = [], []
    adapters: dict[Any, str] = {}
    for each in wanted:
        if not each.path.exists():
            check_writable(each.path, overwrite=overwrite)
            found.append(each)
        elif difference := _difference(each, adapters):
            found.append(each)
            changed.append(f"{each.path.name} ({difference})")
    if changed and not overwrite:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise OutputError(
            f"{len(changed)} of the pictures in '{wanted[0].spec.output}' were drawn with other settings: "
            f"{', '.join(changed[:_SHOWN])}{more}. Give --overwrite to draw those "
            "anew, or choose another output."
        )
    return found


def _difference(wanted: Wanted, hashes: dict[Any, str]) -> str:
    """Return in what the picture at the path of a wanted one differs from it, empty if in nothing."""
    try:
        drawn = read_spec(wanted.path)
    except StudioError:
        return "not drawn by this program, or edited"
    own, other = (_settings(spec) for spec in (wanted.spec, drawn))
    if names := [name for name in own if own[name] != other.get(name)]:
        return ", ".join(names)
    for use in wanted.spec.adapters:
        if use.path not in hashes:
            hashes[use.path] = tensor_hash(use.path)
        if drawn.expected_hashes.get(str(use.path), hashes[use.path]) != hashes[use.path]:
            return f"another {use.path.name}"
    return ""


def _settings(spec: GenerateSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude=set(NOT_OF_THE_PICTURE))


class _Meter:
    """Takes the events of group after group as those of one run, with its speed.

    Args:
        total: Denoising steps of all.
        pictures: Number of all.
        tell: Told of the run.
    """

    def __init__(self, total: int, pictures: int, tell: OnEvent) -> None:
        self._total, self._pictures, self._tell = total, pictures, tell
        self._before = self._drawn = 0
        self._start: tuple[int, float] | None = None

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        if event.kind == "progress":
            step, now = self._before + event.step, time.monotonic()
            # What is loaded before the first step is no matter of speed.
            first, start = self._start = self._start or (step, now)
            done = (step - first) / self._total * self._pictures
            speed = {"images/s": done / (now - start)} if now > start else {}
            event = event.model_copy(update={"step": step, "total": self._total, "values": speed})
        elif event.kind == "picture":
            event = event.model_copy(update={"step": self._drawn + 1, "total": self._pictures})
        self._tell(event)

    def count(self) -> None:
        """Note a picture."""
        self._drawn += 1

    def close_group(self, steps: int) -> None:
        """Note that a group of so many steps is done."""
        self._before += steps
