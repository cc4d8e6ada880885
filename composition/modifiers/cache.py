"""Cache: keep the deep features of each branch for some steps."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import BaseInfo, Branch, Cut, Modifier, Plan, Request, Step
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class CachedPlan(ModifiedPlan):
    """The inner plan with a slot for each of its branches."""

    options: "Cache.Options"

    @property
    def constant(self) -> bool:  # type: ignore[override]
        """False: what is computed depends on the step."""
        return False

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches; between two refreshes they reuse their features."""
        return tuple(
            replace(branch, slot=_slot(place, branch), reuse=self._reuse(step))
            for place, branch in enumerate(self.inner.at(step))
        )

    def without_effect(self, run: Sequence[Step]) -> Iterator[str]:
        """Yield a sentence where no step of a run reuses or refreshes, and what the inner plan yields."""
        own, total = self.options, run[0].total
        if own.interval > 1 and not any(map(self._reuse, run)):
            yield (
                f"cache: all {total} steps of this run are computed whole, with interval {own.interval}, "
                f"full_first {own.full_first} and full_last {own.full_last}. Lower these, or leave it out."
            )
        elif own.interval >= total > 1:
            yield (
                f"cache: with interval {own.interval}, what the first steps of this run of {total} compute "
                "is never refreshed. Lower interval."
            )
        yield from self.inner.without_effect(run)

    def _reuse(self, step: Step) -> int:
        outer = step.index < self.options.full_first or step.index >= step.total - self.options.full_last
        return 0 if outer or step.index % self.options.interval == 0 else self.options.interval - 1


def _slot(place: int, branch: Branch) -> Hashable:
    # Not the weights themselves: while they change slowly the features are of use all the same.
    acting = tuple(sorted(name for name, weight in branch.weights.items() if weight))
    return place, branch.rows, branch.text, acting


@MODIFIERS.register("cache")
class Cache(Modifier):
    """Compute the deep layers every ``interval`` steps only, for every branch of any method and for the base.

    DeepCache, arXiv:2312.00858, Sec. 3.3 (uniform 1:N). Features are never taken from another adapter's
    answer: a branch that acts for the first time, or after a longer pause, is computed whole. Differs from
    the paper: the first and the last steps are always computed.
    """

    class Options(MethodOptions):
        """Options of the cache."""

        interval: int = Field(3, ge=1, description="Steps from one refresh to the next; 1 caches nothing.")
        full_first: int = Field(2, ge=0, description="Steps at the start that are always computed whole.")
        full_last: int = Field(2, ge=0, description="Steps at the end that are always computed whole.")
        cut_level: int = Field(
            0,
            ge=0,
            description="Resolution level of the UNet where the shallow part ends; 0 is the outer.",
        )
        cut_layers: int = Field(
            1, ge=1, description="Layers of that level that are computed on the way down; more costs more."
        )

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with a cache."""
        options = self.options
        return CachedPlan.around(plan, cut=Cut(options.cut_level, options.cut_layers), options=options)
