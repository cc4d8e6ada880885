"""The plan of what the form composes: a picture that the worker draws, as it has the adapters' sizes."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from studio.prompt_settings import settled
from studio.specs import GenerateSpec, parse_spec
from studio.specs.composing import PlanSpec
from studio.ui.follow import Follower, Story
from studio.ui.forms import Values
from studio.ui.panel import Panel
from studio.ui.pictures import unique
from studio.workspace import Workspace

IDLE = '<div class="idle">Which adapter acts when, and what each step costs, before anything is drawn.</div>'


class PlanView:
    """A button and the picture that it asks for.

    Args:
        space: Where the picture is kept.
        follower: Reads the jobs.
        trouble: Returns why the worker does nothing at the moment.
    """

    def __init__(self, space: Workspace, follower: Follower, trouble: Callable[[], str]) -> None:
        self.space = space
        self.panel = Panel("plan", follower, trouble, idle=IDLE)

    def layout(self) -> None:
        """Place all components, folded up."""
        with gr.Accordion("Plan", open=False, elem_id="plan"):
            self.panel.buttons("Show plan")
            self.panel.state()
            picture = gr.Image(
                interactive=False,
                show_label=False,
                visible=False,
                buttons=["download", "fullscreen"],
                elem_id="plan-picture",
            )
        self.panel.follow("picture", picture, _drawn, _shown)

    def wire(self, timer: gr.Timer, request: Callable[..., Values], inputs: list[Any]) -> None:
        """Connect the button with the form.

        Args:
            timer: Ticks of it refresh the view.
            request: Returns the form's request for pictures from the values of ``inputs``.
            inputs: Components of the form.
        """
        self.panel.wire(timer, lambda *values: self.asked(request(*values)), inputs)

    def asked(self, request: Values) -> Values:
        """Return the request for the plan of what a request for pictures composes.

        Raises:
            SpecError: Lists every problem of the form.
        """
        asked = parse_spec(GenerateSpec, {"adapter_folder": self.space.adapters, **request})
        spec = settled(asked).model_dump(mode="json")
        fields = {name: value for name, value in spec.items() if name in PlanSpec.model_fields}
        picture = self.space.inside(self.space.pictures / unique("plan") / "plan.png")
        fields |= {"picture": str(picture), "measure": True}
        parse_spec(PlanSpec, fields)
        return fields


def _drawn(story: Story | None) -> str:
    pictures = story.shown_pictures() if story else []
    return pictures[-1][0] if pictures else ""


def _shown(story: Story | None) -> Any:
    return gr.update(value=_drawn(story) or None, visible=bool(_drawn(story)))
