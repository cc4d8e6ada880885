"""A folded part of the Generate tab with a button and the one picture that a job of its kind draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio.jobs import Kind
from studio.ui.follow import Follower, Story
from studio.ui.forms import Values
from studio.ui.panel import Panel
from studio.ui.pictures import unique
from studio.workspace import Workspace


class Sketch:
    """What plan and comparison have in common.

    Args:
        space: Where the picture is kept.
        follower: Reads the jobs.
        trouble: Returns why the worker does nothing at the moment.

    Attributes:
        kind: Of the jobs.
        field: The picture in their specification.
        heading: Of the part.
        button: What starts a job.
        idle: HTML shown before the first one.
    """

    kind: Kind
    field: str
    heading: str
    button: str
    idle: str

    def __init__(self, space: Workspace, follower: Follower, trouble: Callable[[], str]) -> None:
        self.space = space
        self.panel = Panel(self.kind, follower, trouble, idle=f'<div class="idle">{self.idle}</div>')
        self.inputs: list[Any] = []

    def layout(self) -> None:
        """Place all components, folded up."""
        with gr.Accordion(self.heading, open=False, elem_id=self.kind):
            self.place_inputs()
            self.panel.buttons(self.button)
            self.panel.state()
            picture = gr.Image(
                interactive=False,
                show_label=False,
                visible=False,
                buttons=["download", "fullscreen"],
                elem_id=f"{self.kind}-picture",
            )
        self.panel.follow(
            "picture",
            picture,
            self._drawn,
            lambda story: gr.update(value=self._drawn(story) or None, visible=bool(self._drawn(story))),
        )

    def place_inputs(self) -> None:
        """Place fields of its own, the values of which ``asked`` takes; none by default."""

    def wire(self, request: Callable[..., Values], inputs: list[Any]) -> None:
        """Connect the button with the form.

        Args:
            request: Returns the form's request for pictures from the values of ``inputs``.
            inputs: Components of the form.
        """
        number = len(self.inputs)
        self.panel.wire(
            lambda *values: self.asked(request(*values[number:]), *values[:number]),
            [*self.inputs, *inputs],
        )

    def asked(self, request: Values, *values: Any) -> Values:
        """Return the request for the picture about a request for pictures.

        Args:
            request: The form's.
            values: Of the part's own fields.

        Raises:
            SpecError: Lists every problem of the form.
        """
        raise NotImplementedError

    def free_picture(self) -> str:
        """Return a picture's path in a new folder of the workspace."""
        folder = self.space.inside(self.space.pictures / unique(self.kind))
        return str(folder / f"{self.kind}.png")

    def _drawn(self, story: Story | None) -> str:
        """Return the picture of a job that has ended, or an empty string."""
        if story is None or story.job.active:
            return ""
        picture = Path(story.job.spec[self.field])
        return str(picture) if picture.is_file() else ""
