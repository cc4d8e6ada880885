"""Pin: adapters that stay on, whatever the composition method does with the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import BaseInfo, Branch, Modifier, Plan, Request, Step
from studio.composition.policies import known
from studio.errors import CompositionError
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class PinnedPlan(ModifiedPlan):
    """The inner plan with further adapters in each of its branches.

    Attributes:
        pinned: Weight by adapter.
    """

    pinned: Mapping[str, float]

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches, each with the pinned adapters."""
        return tuple(
            replace(branch, weights={**branch.weights, **self.pinned}) for branch in self.inner.at(step)
        )


@MODIFIERS.register("pin")
class Pin(Modifier):
    """Keep adapters on in every evaluation of every step, and wherever a prompt is encoded.

    The method does not see them: they take no turn of Switch and no layer of K-LoRA, and act in conditional
    and unconditional rows alike. Meant for a safety adapter that must never be switched off:
    Safety Alignment Backfires, arXiv:2412.00357 (Modular LoRA).
    """

    outermost = 1

    class Options(MethodOptions):
        """Options of pinning."""

        adapters: tuple[str, ...] = Field(min_length=1, description="Names of the adapters that stay on.")

    def takes(self, adapters: Sequence[str]) -> Sequence[str]:
        """Return the pinned adapters.

        Raises:
            CompositionError: If one is not there.
        """
        return known("pin", self.options.adapters, adapters)

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with the pinned adapters on.

        Raises:
            CompositionError: If an adapter is not there, or the plan has one of that name.
        """
        pinned = {name: weights[name] for name in self.takes(list(adapters))}
        if taken := pinned.keys() & {*plan.adapters, *plan.formed}:
            raise CompositionError(
                f"pin: the method has an adapter called '{min(taken)}' of its own. Give the pinned one "
                "another name."
            )
        return PinnedPlan.around(
            plan,
            adapters=(*plan.adapters, *pinned),
            text_weights={**plan.text_weights, **pinned},
            texts={
                name: replace(text, weights={**text.weights, **pinned}) for name, text in plan.texts.items()
            },
            pinned=pinned,
        )
