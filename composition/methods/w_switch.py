"""W-Switch: turns whose length is how much each adapter matters to the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.importance import by_ablation, triggers_of
from studio.composition.plan import BaseInfo, Composer, Request, Step
from studio.composition.policies import SharedTextPolicy, check_some, known, say_if_alone, text_weights
from studio.composition.turns import SOLVER_HISTORY, SolverHistory, TurnsPlan
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class WSwitchPlan(TurnsPlan):
    """Turns of ``turns`` steps in the order of ``adapters``, over and over, and ``final`` at the end."""

    turns: tuple[int, ...]
    final: str | None
    final_steps: int

    def active(self, step: Step) -> str:
        """Return the adapter that acts at a step."""
        if self.final is not None and step.index >= step.total - self.final_steps:
            return self.final
        place = step.index % sum(self.turns)
        for name, turn in zip(self.adapters, self.turns, strict=True):
            if place < turn:
                return name
            place -= turn
        raise AssertionError("a cycle has a turn for each of its steps")

    def check(self, total: int) -> None:
        """Raise CompositionError when the run is too short for every adapter to have a turn."""
        if idle := self.idle(total):
            raise CompositionError(
                f"in a run of {total} steps {', '.join(map(repr, idle))} would never have a turn. Take more "
                "steps, or lower switch_every or final_steps (image-to-image runs steps x strength of them)."
            )


@COMPOSERS.register("w-switch")
class WSwitch(Composer):
    """Switch with turns in proportion to the adapters' importance for the prompt.

    A cycle is as long as that of Switch, ``N * switch_every`` steps; an adapter's share of it is how much the
    prompt's embedding changes without its trigger words, one step at least. The last steps are one adapter's.
    Costs one evaluation a step, like the base, and N + 1 encodings before the first.
    W-Switch, arXiv:2606.03792. Differs from the paper: which adapter ends the run is an option, because files
    do not tell which one is the character.
    """

    class Options(MethodOptions):
        """Options of W-Switch."""

        switch_every: int = Field(5, ge=1, description="Mean number of steps of a turn (tau).")
        triggers: dict[str, str] = Field(
            default_factory=dict, description="Trigger words by adapter; default: what its file tells."
        )
        final: str = Field("", description="Adapter of the last steps; default: the first one.")
        final_steps: int = Field(5, ge=0, description="How many steps it has at the end; 0 for none.")
        text_encoder_policy: SharedTextPolicy = "merged"
        solver_history: SolverHistory = Field("keep", description=SOLVER_HISTORY)

    reads_prompt = True

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> WSwitchPlan:
        """Return the plan; while the prompt is not known, with equal turns.

        Raises:
            CompositionError: If there is no adapter, or trigger words or the final adapter are not known.
        """
        check_some("w-switch", adapters)
        say_if_alone(adapters)
        options = self.options
        final = options.final or next(iter(adapters))
        known("final", [final], list(adapters))
        triggers = triggers_of(adapters, options.triggers)
        importance = dict.fromkeys(adapters, 1.0) if request is None else by_ablation(triggers, request)
        return WSwitchPlan(
            tuple(adapters),
            weights=dict(weights),
            solver_history=options.solver_history,
            turns=turns(list(importance.values()), len(adapters) * options.switch_every),
            final=final if options.final_steps else None,
            final_steps=options.final_steps,
            text_weights=text_weights(options.text_encoder_policy, weights),
        )


def turns(importance: Sequence[float], total: int) -> tuple[int, ...]:
    """Return whole numbers that sum to ``total``, each at least 1, in proportion to the importance.

    What is left after rounding down goes to the largest remainders (Hamilton's method).

    Example:
        >>> turns([3.0, 1.0, 0.0], 10)
        (6, 3, 1)
    """
    whole = sum(importance)
    parts = [value / whole if whole > 0 else 1 / len(importance) for value in importance]
    rest = total - len(parts)
    exact = [part * rest for part in parts]
    counts = [int(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda place: counts[place] - exact[place])
    for place in order[: rest - sum(counts)]:
        counts[place] += 1
    return tuple(count + 1 for count in counts)
