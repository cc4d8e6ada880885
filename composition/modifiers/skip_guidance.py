"""Skip guidance: in some steps the conditional answer counts alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import BaseInfo, Branch, Modifier, Plan, Request, Step
from studio.errors import CompositionError
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class UnguidedPlan(ModifiedPlan):
    """The inner plan without its unconditional rows from ``start`` on and before ``end``."""

    start: float
    end: float

    @property
    def constant(self) -> bool:  # type: ignore[override]
        """False: guidance depends on the step."""
        return False

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches, of the conditional rows alone where guidance is skipped."""
        branches = self.inner.at(step)
        if not self._skips(step):
            return branches
        kept = [branch for branch in branches if branch.answers_for("conditional")]
        return tuple(replace(branch, rows="conditional") for branch in kept)

    def without_effect(self, run: Sequence[Step]) -> Iterator[str]:
        """Yield a sentence where no step of a run is in the stretch, and what the inner plan yields."""
        if not any(map(self._skips, run)):
            yield (
                f"skip-guidance: no step of this run, from {run[0].fraction:.3g} to "
                f"{run[-1].fraction:.3g} of the schedule, lies between start {self.start:g} and end "
                f"{self.end:g}. Widen it, or leave it out."
            )
        yield from self.inner.without_effect(run)

    def _skips(self, step: Step) -> bool:
        return self.start <= step.fraction < self.end


@MODIFIERS.register("skip-guidance")
class SkipGuidance(Modifier):
    """Leave classifier-free guidance out of a stretch of the run: half the work there.

    Guidance matters least at the end, where details are settled: "Applying Guidance in a Limited Interval",
    arXiv:2404.07724, and adaptive guidance, arXiv:2312.12487.
    """

    class Options(MethodOptions):
        """Options of skipping."""

        start: float = Field(0.7, ge=0, le=1, description="Where skipping begins, as a fraction of the run.")
        end: float = Field(1.0, ge=0, le=1, description="Where it ends, as a fraction of the run.")

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with a stretch without guidance.

        Raises:
            CompositionError: If the stretch is empty.
        """
        start, end = self.options.start, self.options.end
        if not start < end:
            raise CompositionError(f"skip-guidance: start must be below end, got {start:g} and {end:g}.")
        return UnguidedPlan.around(plan, start=start, end=end)
