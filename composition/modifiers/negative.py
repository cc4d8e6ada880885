"""Negative: adapters that act on what is steered away from, and nowhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.plan import BaseInfo, Branch, ModifiedPlan, Modifier, Plan, Request, Step
from studio.composition.policies import known
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class NegativePlan(ModifiedPlan):
    """The inner plan with further adapters where its branches answer for the unconditional rows.

    Attributes:
        negative: Weight by adapter.
    """

    negative: Mapping[str, float]

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches, those for all rows in two."""
        found: list[Branch] = []
        for branch in self.inner.at(step):
            if branch.answers_for("conditional"):
                found.append(replace(branch, rows="conditional"))
            if branch.answers_for("unconditional"):
                weights = {**branch.weights, **self.negative}
                found.append(replace(branch, rows="unconditional", weights=weights))
        return tuple(found)


@MODIFIERS.register("negative")
class Negative(Modifier):
    """Let adapters act on the unconditional rows alone: guidance steers away from what they draw.

    For adapters of what is not wanted, such as one of bad anatomy. What the prompt asks for is answered
    without them, so they cannot disturb it. The method does not see them; without guidance they do nothing.
    Costs no more rows, but two evaluations where there was one, unless they stand in one batch.
    """

    class Options(MethodOptions):
        """Options of negative adapters."""

        adapters: tuple[str, ...] = Field(min_length=1, description="Names of the adapters.")

    def takes(self, adapters: Sequence[str]) -> Sequence[str]:
        """Return the negative adapters.

        Raises:
            CompositionError: If one is not there.
        """
        return known("negative", self.options.adapters, adapters)

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with the negative adapters."""
        return NegativePlan.around(
            plan, negative={name: weights[name] for name in self.takes(list(adapters))}
        )
