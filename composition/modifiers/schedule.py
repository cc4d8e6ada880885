"""Schedule: weights that change along the run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from studio.composition.plan import BaseInfo, Modifier, Plan, Request
from studio.composition.shaped import ShapedPlan, check_named, curve_text, read_curve
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
        check_named("schedule", list(self.options.weights), plan)
        return ShapedPlan.around(plan, shapes=self.options.weights)
