"""Schedule: weights that change along the run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from studio.composition.plan import BaseInfo, Modifier, Plan, Request
from studio.composition.shaped import ShapedPlan, curve_text, read_curve
from studio.errors import CompositionError
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

_Curve = Annotated[Any, BeforeValidator(read_curve), PlainSerializer(curve_text)]


@MODIFIERS.register("schedule")
class Schedule(Modifier):
    """Multiply adapters' weights by curves over the steps, under any method.

    The text encoders, which run once, keep the adapters' own weights. Weights that change at every step are
    formed anew at every step, in full precision.
    """

    class Options(MethodOptions):
        """Options of a schedule."""

        weights: Mapping[str, _Curve] = Field(
            description="Curve by adapter: points [[place, weight], ...] with the place as a fraction of the "
            "steps, or text such as '0@0, 1@0.3' (weight@place)."
        )

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with weights that follow the curves.

        Raises:
            CompositionError: If a curve is for an adapter that the plan gives no weight to.
        """
        if unknown := [name for name in self.options.weights if name not in plan.adapters]:
            raise CompositionError(
                f"schedule: '{unknown[0]}' is none of what the method gives weights to: "
                f"{', '.join(plan.adapters) or 'nothing'}. Name one of these; a pinned adapter keeps its "
                "weight at every step, and a method that makes one adapter of several leaves only that one."
            )
        return ShapedPlan.around(plan, shapes=self.options.weights)
