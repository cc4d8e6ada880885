"""The plan of what the form composes: a picture that the worker draws, as it has the adapters' sizes."""

from typing import Any

from studio.prompt_settings import settled
from studio.specs import GenerateSpec, parse_spec
from studio.specs.composing import PlanSpec
from studio.ui.forms import Values
from studio.ui.sketches import Sketch


class PlanView(Sketch):
    """Which adapter acts when."""

    kind = "plan"
    field = "picture"
    heading = "Plan"
    button = "Show plan"
    idle = "Which adapter acts when, and what each step costs, before anything is drawn."

    def asked(self, request: Values, *values: Any) -> Values:
        """Return the request for the plan of what a request for pictures composes.

        Raises:
            SpecError: Lists every problem of the form.
        """
        asked = parse_spec(GenerateSpec, {"adapter_folder": self.space.adapters, **request})
        spec = settled(asked).model_dump(mode="json")
        fields = {name: value for name, value in spec.items() if name in PlanSpec.model_fields}
        fields |= {"picture": self.free_picture(), "measure": True}
        parse_spec(PlanSpec, fields)
        return fields
