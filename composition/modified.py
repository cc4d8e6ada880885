"""A plan around another plan: what modifiers make."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from studio.composition.plan import Plan, Step

if TYPE_CHECKING:
    from torch import Tensor

    from studio.composition.attention import View


@dataclass(frozen=True)
class ModifiedPlan(Plan):
    """A plan that follows another one; what it does not change is the other's.

    Attributes:
        inner: The other plan.
    """

    inner: Plan

    @property
    def constant(self) -> bool:  # type: ignore[override]
        """True when the inner plan does not depend on the step."""
        return self.inner.constant

    def restarts(self, step: Step) -> bool:
        """Return whether the inner plan has the solver start anew."""
        return self.inner.restarts(step)

    def steered(self, view: "View") -> "Tensor | None":
        """Return the latents that the inner plan goes on with."""
        return self.inner.steered(view)

    def found(self, maps: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Return the regions that the inner plan finds."""
        return self.inner.found(maps)

    def check(self, total: int) -> None:
        """Raise CompositionError when a run of ``total`` steps cannot do what the inner plan is for."""
        self.inner.check(total)

    def without_effect(self, run: Sequence[Step]) -> Iterator[str]:
        """Yield a sentence on each part of the inner plan that does nothing in a run of these steps."""
        return self.inner.without_effect(run)

    @classmethod
    def around(cls, plan: Plan, **changes: Any) -> Self:
        """Return a plan around another one, with its fields except for the changes."""
        own = {name: getattr(plan, name) for name in (each.name for each in fields(Plan))}
        return cls(**{**own, **changes}, inner=plan)
