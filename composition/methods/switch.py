"""Switch: one adapter at a time, taking turns along the denoising steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from studio.composition.plan import BaseInfo, Composer, Request, Step
from studio.composition.policies import SharedTextPolicy, check_some, text_weights
from studio.composition.turns import SOLVER_HISTORY, SolverHistory, TurnsPlan
from studio.errors import CompositionError
from studio.registry import COMPOSERS, nearest
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class SwitchPlan(TurnsPlan):
    """Turns of ``period`` steps in the order of ``adapters``, over and over."""

    period: int

    def active(self, step: Step) -> str:
        """Return the adapter that acts at a step.

        ``i(t) = floor(((t - 1) mod (k tau)) / tau) + 1`` for t and i counted from 1, arXiv:2402.16843, Sec.
        3.1.
        """
        return self.adapters[step.index % (len(self.adapters) * self.period) // self.period]

    def check(self, total: int) -> None:
        """Raise CompositionError when the run is too short for every adapter to have a turn."""
        idle = [name for turn, name in enumerate(self.adapters) if turn * self.period >= total]
        if not idle:
            return
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
            f"switch_every={self.period} in a run of {total} steps lets only {acting} act; "
            f"{', '.join(repr(name) for name in idle)} would never have a turn. {lower} (image-to-image runs "
            "steps x strength of them)."
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
            CompositionError: If there is no adapter, or ``order`` does not name each adapter once.
        """
        check_some("switch", adapters)
        order = self.options.order or tuple(adapters)
        _check_order(order, list(adapters))
        ordered = {name: weights[name] for name in order}
        return SwitchPlan(
            order,
            weights=dict(weights),
            solver_history=self.options.solver_history,
            period=self.options.switch_every,
            text_weights=text_weights(self.options.text_encoder_policy, ordered),
        )


def _check_order(order: Sequence[str], known: list[str]) -> None:
    """Raise CompositionError unless ``order`` names each known adapter once."""
    unknown = [name for name in order if name not in known]
    missing = [name for name in known if name not in order]
    repeated = sorted({name for name in order if order.count(name) > 1})
    problems = [f"unknown adapter '{name}'.{nearest(name, known)}" for name in unknown]
    problems += [f"adapter '{name}' is missing." for name in missing]
    problems += [f"adapter '{name}' is named more than once." for name in repeated]
    if problems:
        raise CompositionError(f"order: {' '.join(problems)} Name each of these once: {', '.join(known)}.")
