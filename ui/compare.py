"""The same pictures by several composition methods, side by side, with what each costs."""

from typing import Any

import gradio as gr

from studio.errors import UsageError
from studio.registry import COMPOSERS
from studio.specs import GenerateSpec, parse_spec
from studio.specs.composing import CompareSpec
from studio.ui.forms import Values
from studio.ui.sketches import Sketch

FIRST = ["merge", "switch", "composite"]


class CompareView(Sketch):
    """Methods to choose, and the picture of all of them."""

    kind = "compare"
    field = "grid"
    heading = "Compare methods"
    button = "Compare"
    idle = "The pictures of the form by each method and by the base alone, a row each with its cost."

    def place_inputs(self) -> None:
        """Place the choice of methods."""
        self.methods = gr.Dropdown(
            COMPOSERS.names(),
            value=FIRST,
            multiselect=True,
            label="Methods",
            info="The one chosen in the form has the options it has there, the others their defaults.",
            elem_id="compare-methods",
        )
        self.inputs = [self.methods]

    def asked(self, request: Values, *values: Any) -> Values:
        """Return the request for the comparison of methods on a request for pictures.

        Raises:
            SpecError: Lists every problem of the form.
            UsageError: If no method is chosen.
        """
        (methods,) = values
        if not methods:
            raise UsageError("methods: choose at least one to compare.")
        asked = parse_spec(GenerateSpec, request)
        spec = asked.model_dump(mode="json")
        fields = {name: value for name, value in spec.items() if name in CompareSpec.model_fields}
        fields |= {
            "methods": methods,
            "method_options": {asked.method: spec["options"]} if asked.method in methods else {},
            "seeds": [asked.seed + place for place in range(asked.count)],
            "grid": self.free_picture(),
        }
        parse_spec(CompareSpec, fields)
        return fields
