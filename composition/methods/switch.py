"""Switch: one adapter at a time, taking turns along the denoising steps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from studio.composition.plan import BaseInfo, Composer, Request, Step
from studio.composition.policies import SharedTextPolicy, check_some, known, say_if_alone, text_weights
from studio.composition.turns import SOLVER_HISTORY, SolverHistory, TurnsPlan
from studio.errors import CompositionError
from studio.registry import COMPOSERS, nearest
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


Range = tuple[float, float]
"""From where up to where, as fractions of the steps that are run."""
_NUMBER = r"(\d*\.?\d+(?:e-?\d+)?)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}\s*")


def read_range(given: Any) -> Range:
    """Return a range from two fractions of a run, ``[0, 0.4]``, or text, ``"0-0.4"``.

    Raises:
        ValueError: If it is none.
    """
    found = _RANGE.fullmatch(given) if isinstance(given, str) else None
    pair = found.groups() if found else given
    try:
        start, end = map(float, pair)
    except (TypeError, ValueError):
        start, end = 1.0, 0.0
    if (isinstance(given, str) and not found) or not 0 <= start < end <= 1:
        raise ValueError(
            "a range is two fractions of the run, the first below the second: '0-0.4' or [0, 0.4]"
        )
    return start, end


def range_text(given: Range) -> str:
    """Return a range as the text that :func:`read_range` reads it from.

    Example:
        >>> range_text((0.0, 0.4))
        '0-0.4'
    """
    return "-".join(repr(place).removesuffix(".0") for place in given)


_Range = Annotated[Any, BeforeValidator(read_range), PlainSerializer(range_text)]


@dataclass(frozen=True)
class SwitchPlan(TurnsPlan):
    """Turns of ``period`` steps in the order of ``adapters``, over and over.

    Attributes:
        period: Steps of a turn.
        ranges: Where an adapter takes part; who has none does in all of the run.
    """

    period: int
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def active(self, step: Step) -> str:
        """Return the adapter that acts at a step.

        Without ranges ``i(t) = floor(((t - 1) mod (k tau)) / tau) + 1`` for t and i counted from 1,
        arXiv:2402.16843, Sec. 3.1.
        """
        ranges = tuple(self.ranges.get(name, (0.0, 1.0)) for name in self.adapters)
        return self.adapters[_timetable(ranges, self.period, step.total)[step.index]]

    def check(self, total: int) -> None:
        """Raise CompositionError when the run is too short for every adapter to have a turn."""
        if not (idle := self.idle(total)):
            return
        names = ", ".join(map(repr, idle))
        if self.ranges:
            raise CompositionError(
                f"in a run of {total} steps {names} would never have a turn: others have theirs all through "
                "its range, or that holds no step. Widen the range, lower switch_every or take more steps "
                "(image-to-image runs steps x strength of them)."
            )
        turns = len(self.adapters) - 1
        shortest = turns + 1
        lower = (
            f"Lower switch_every to at most {(total - 1) // turns} or take more than {turns * self.period} "
            "steps"
            if total >= shortest
            else f"Take at least {shortest} steps and switch_every=1"
        )
        acting = ", ".join(f"'{name}'" for name in self.adapters[: -len(idle)])
        raise CompositionError(
            f"switch_every={self.period} in a run of {total} steps lets only {acting} act; {names} would "
            f"never have a turn. {lower} (image-to-image runs steps x strength of them)."
        )


@COMPOSERS.register("switch")
class Switch(Composer):
    """Let one adapter act at a time and change it every ``switch_every`` steps.

    Costs one evaluation of the denoiser per step, like the base, and keeps apart what a merge would mix.
    LoRA Switch of Multi-LoRA Composition, arXiv:2402.16843, Sec. 3.1; tau = 5 as there.

    The authors' code advances after step i (from 0) when i > 0 and i mod tau = 0, so its first adapter has
    tau + 1 steps; here every turn has tau steps, as in the paper's formula. Differs from the paper: the text
    encoders, which run once before the first step, have all adapters merged by default, so that each trigger
    word means what its adapter learnt; the authors' code encodes with the first adapter only
    (``text_encoder_policy="first"``). Multistep solvers go on with the answers of the adapter before, as in
    the authors' code; ``solver_history="drop"`` has them start anew with each turn.

    Beyond the paper: with ``ranges`` an adapter takes turns in a part of the run only. A turn goes to the
    next adapter in the order whose range holds the step, and ends where the range does.
    """

    class Options(MethodOptions):
        """Options of Switch."""

        switch_every: int = Field(
            5, ge=1, description="Steps an adapter acts before the next one takes over (tau)."
        )
        order: tuple[str, ...] = Field(
            (),
            description="All adapters' names in the order of their turns, with commas; default: as given.",
        )
        ranges: Mapping[str, _Range] = Field(
            default_factory=dict,
            description="Part of the run in which an adapter takes turns, by name, as fractions of the steps "
            "that are run, such as 0-0.4; default: all of it.",
        )
        text_encoder_policy: SharedTextPolicy = "merged"
        solver_history: SolverHistory = Field("keep", description=SOLVER_HISTORY)

        @field_validator("order", mode="before")
        @classmethod
        def _split(cls, given: Any) -> Any:
            # A repeated flag gives a list, each item of which may hold commas too.
            items = [given] if isinstance(given, str) else given
            if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
                return given
            return tuple(name.strip() for item in items for name in item.split(",") if name.strip())

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> SwitchPlan:
        """Return the plan.

        Raises:
            CompositionError: If there is no adapter, ``order`` does not name each adapter once, or ``ranges``
                name others or leave a part of the run to nobody.
        """
        check_some("switch", adapters)
        say_if_alone(adapters)
        order = self.options.order or tuple(adapters)
        _check_order(order, list(adapters))
        _check_ranges(self.options.ranges, order)
        ordered = {name: weights[name] for name in order}
        return SwitchPlan(
            order,
            weights=dict(weights),
            solver_history=self.options.solver_history,
            period=self.options.switch_every,
            ranges=dict(self.options.ranges),
            text_weights=text_weights(self.options.text_encoder_policy, ordered),
        )


@cache
def _timetable(ranges: Sequence[Range], period: int, total: int) -> tuple[int, ...]:
    """Return whose turn it is at each step of a run, by the place in the order.

    Args:
        ranges: In the order; together they hold every step.
        period: Steps of a turn.
        total: Steps of the run.
    """
    found: list[int] = []
    turn, left = -1, 0
    for index in range(total):
        within = [start <= index / total < end for start, end in ranges]
        if not left or not within[turn]:
            later = (place % len(ranges) for place in range(turn + 1, turn + 1 + len(ranges)))
            turn, left = next(place for place in later if within[place]), period
        found.append(turn)
        left -= 1
    return tuple(found)


def _check_ranges(ranges: Mapping[str, Range], adapters: Sequence[str]) -> None:
    """Raise CompositionError if a range is of no adapter, or nobody has a part of the run."""
    known("ranges", list(ranges), adapters)
    reached = 0.0
    for start, end in sorted(ranges.get(name, (0.0, 1.0)) for name in adapters):
        if start > reached:
            break
        reached = max(reached, end)
    if reached < 1:
        later = [start for start, _ in ranges.values() if start > reached]
        raise CompositionError(
            f"ranges: nobody has a turn from {reached:g} to {min(later, default=1.0):g} of the run. Widen a "
            "range, or leave one out: who has none takes part in all of the run. To draw a part of it by the "
            "base alone, take weights to 0 there with the modifier 'schedule'."
        )


def _check_order(order: Sequence[str], adapters: list[str]) -> None:
    """Raise CompositionError unless ``order`` names each adapter once."""
    unknown = [name for name in order if name not in adapters]
    missing = [name for name in adapters if name not in order]
    repeated = sorted({name for name in order if order.count(name) > 1})
    problems = [f"unknown adapter '{name}'.{nearest(name, adapters)}" for name in unknown]
    problems += [f"adapter '{name}' is missing." for name in missing]
    problems += [f"adapter '{name}' is named more than once." for name in repeated]
    if problems:
        raise CompositionError(f"order: {' '.join(problems)} Name each of these once: {', '.join(adapters)}.")
