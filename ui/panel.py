"""The live part of a tab: what the newest job of its kind is doing, polled from the queue.

A page that is loaded again shows the same. Each part carries a mark of what it shows and is sent again only
when the mark changes. The marks lie in the browser and come with what they are marks of: answers to a click
and to the clock may arrive in any order, and what was shown last is what the next is compared with.
"""

import hashlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.jobs import Kind
from studio.ui.follow import Follower, Story, notice, status

Seen = dict[str, str]


@dataclass(frozen=True)
class Part:
    """One component that follows the job.

    Attributes:
        mark: Says what would be shown; a change of it is a reason to send the component again.
        show: Returns the component's update.
    """

    component: Any
    mark: Callable[[Story | None], Hashable]
    show: Callable[[Story | None], Any]


class Panel:
    """Start and Stop, state, pictures and messages of the newest job of one kind.

    Args:
        kind: Kind of the jobs.
        follower: Reads them.
        trouble: Returns why the worker does nothing at the moment, or an empty string.
        idle: HTML shown before the first job.
    """

    def __init__(self, kind: Kind, follower: Follower, trouble: Callable[[], str], *, idle: str) -> None:
        self.kind, self.follower, self.trouble, self.idle = kind, follower, trouble, idle
        self.parts: dict[str, Part] = {}

    def buttons(self, start: str) -> None:
        """Place Start, Stop and the line for messages about the form."""
        self.seen = gr.JSON({}, visible=False)
        self.pulse = gr.State(0)
        with gr.Row(elem_classes="buttons"):
            self.start = gr.Button(start, variant="primary", elem_id=f"{self.kind}-start", scale=3)
            self.stop = gr.Button("Stop", elem_id=f"{self.kind}-stop", interactive=False, scale=1)
            self.again = gr.Button("Retry", elem_id=f"{self.kind}-retry", visible=False, scale=1)
        self.message = gr.HTML(elem_id=f"{self.kind}-message")
        self.follow("stop", self.stop, _stoppable, lambda story: gr.update(interactive=_stoppable(story)))
        self.follow("again", self.again, _retryable, lambda story: gr.update(visible=_retryable(story)))

    def state(self) -> None:
        """Place the state of the job: title, progress bar, facts."""
        shown = gr.HTML(self.idle, elem_id=f"{self.kind}-status")
        self.follow("status", shown, self._status, self._status)

    def pictures(self, label: str, *, columns: int) -> Any:
        """Place the pictures of the job as they come, and return their gallery."""
        gallery = gr.Gallery(
            label=label,
            columns=columns,
            height="auto",
            object_fit="contain",
            interactive=False,
            visible=False,
            elem_id=f"{self.kind}-pictures",
        )

        def paths(story: Story | None) -> tuple[tuple[str, str], ...]:
            return tuple(story.shown_pictures()) if story else ()

        self.follow(
            "pictures",
            gallery,
            paths,
            lambda story: gr.update(value=list(paths(story)), visible=bool(paths(story))),
        )
        return gallery

    def report(self, label: str) -> None:
        """Place what the job said: facts before its start and its messages."""

        def lines(story: Story | None) -> str:
            return "\n".join(story.lines) if story else ""

        with gr.Accordion(label, open=False):
            shown = gr.Textbox(lines=4, max_lines=16, show_label=False, elem_id=f"{self.kind}-report")
        self.follow("report", shown, lines, lines)

    def follow(
        self,
        name: str,
        component: Any,
        mark: Callable[[Story | None], Any],
        show: Callable[[Story | None], Any],
    ) -> None:
        """Keep one more component up to date with the job."""
        self.parts[name] = Part(component, mark, show)

    @property
    def outputs(self) -> list[Any]:
        """What ``refresh`` returns updates for."""
        return [self.seen, *(part.component for part in self.parts.values())]

    def beat(self, seen: Seen) -> Any:
        """Return another value for the pulse, whose change refreshes, if the marks are not those seen."""
        story = self.follower.latest(self.kind)
        return gr.skip() if seen == self._marks(story) else time.monotonic_ns()

    def refresh(self, seen: Seen) -> list[Any]:
        """Return the marks and updates of the parts whose mark is another than the one seen."""
        story = self.follower.latest(self.kind)
        marks = self._marks(story)
        return [
            gr.skip() if seen == marks else marks,
            *(
                gr.skip() if seen.get(name) == marks[name] else part.show(story)
                for name, part in self.parts.items()
            ),
        ]

    def wire(self, submit: Callable[..., Mapping[str, Any]], inputs: list[Any]) -> None:
        """Connect the buttons and the pulse.

        Args:
            submit: Returns the specification to queue, from the values of ``inputs``; may raise StudioError.
            inputs: Components of the form.
        """

        def begin(seen: Seen, *values: Any) -> list[Any]:
            """Queue what the form asks for, or say what is wrong with it."""
            try:
                self.follower.store.submit(self.kind, submit(*values))
            except StudioError as error:
                return [_one_line(error), *self.refresh(seen)]
            return ["", *self.refresh(seen)]

        def on_latest(act: Callable[[int], Any]) -> Callable[[Seen], list[Any]]:
            """Return what does something to the newest job, or says why it cannot."""

            def handle(seen: Seen) -> list[Any]:
                story = self.follower.latest(self.kind)
                try:
                    if story:
                        act(story.job.id)
                except StudioError as error:
                    return [_one_line(error), *self.refresh(seen)]
                return ["", *self.refresh(seen)]

            return handle

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        everything = [self.message, *self.outputs]
        self.start.click(begin, inputs=[self.seen, *inputs], outputs=everything, **quiet)
        self.stop.click(on_latest(self.follower.store.cancel), inputs=self.seen, outputs=everything, **quiet)
        self.again.click(on_latest(self.follower.store.retry), inputs=self.seen, outputs=everything, **quiet)
        self.pulse.change(self.refresh, inputs=self.seen, outputs=self.outputs, **quiet)

    def _marks(self, story: Story | None) -> Seen:
        return {name: _digest(story, part.mark(story)) for name, part in self.parts.items()}

    def _status(self, story: Story | None) -> str:
        if story is None:
            return self.idle
        note = ""
        if story.job.state == "queued":
            ahead = self.follower.ahead(story.job)
            what = {
                "train": "a training",
                "generate": "a drawing",
                "plan": "a plan",
                "compare": "a comparison",
            }
            note = f"It starts after {what[ahead.kind]} that is running." if ahead else self.trouble()
        return status(story, note=note)


def follow_clock(timer: gr.Timer, panels: Sequence[Panel]) -> None:
    """Let every tick look whether panels have something new to show.

    The answer to a tick goes to pulses alone, which are no components: the browser lays out every component
    that is named as an output, also where it is to stay as it is.
    """
    timer.tick(
        lambda *seen: [panel.beat(each) for panel, each in zip(panels, seen, strict=True)],
        inputs=[panel.seen for panel in panels],
        outputs=[panel.pulse for panel in panels],
        show_progress="hidden",
        api_visibility="private",
    )


def _digest(story: Story | None, mark: Hashable) -> str:
    """Return a mark in few letters, another for each job: a part may have shown other things between two."""
    job = (story.job.id, story.job.attempt) if story else None
    return hashlib.blake2s(repr((job, mark)).encode(), digest_size=8).hexdigest()


def _stoppable(story: Story | None) -> bool:
    return story is not None and story.job.active and not story.job.stopping


def _retryable(story: Story | None) -> bool:
    return story is not None and story.job.state in ("failed", "cancelled", "interrupted")


def _one_line(error: StudioError) -> str:
    return notice(" · ".join(str(error).splitlines()))
