"""The tab that trains an adapter on pictures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio.errors import DataError, StudioError, UsageError
from studio.presets import presets
from studio.registry import TRAINERS
from studio.specs import TrainSpec, parse_spec
from studio.specs.train import own_rate
from studio.trainers.run_folder import RunFolder
from studio.ui.follow import Follower, Story, notice
from studio.ui.forms import Field, Form, Values, folded
from studio.ui.panel import Panel
from studio.ui.pictures import PICTURES, captioned, example_set, keep_uploads
from studio.ui.train_start import DEMO, DEMO_ON, START, USUAL, is_demo, method_of, preset_values
from studio.workspace import Workspace

PRESETS = "Settings for a task or a GPU, to start from. Of several the later wins."
IDLE = '<div class="idle">Press <b>Train</b> to teach the model the pictures on the left.</div>'


class TrainTab:
    """Form on the left, what the run is doing on the right.

    Args:
        space: Where pictures and adapters lie.
        follower: Reads the jobs.
        trouble: Returns why the worker does nothing at the moment.
    """

    def __init__(self, space: Workspace, follower: Follower, trouble: Callable[[], str]) -> None:
        self.space, self.follower = space, follower
        self.example = example_set(space)
        self.form = Form(TrainSpec, {**START, **DEMO})
        self.panel = Panel("train", follower, trouble, idle=IDLE)

    def layout(self) -> None:
        """Place all components."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._pictures()
                self._fields()
            with gr.Column(scale=6, min_width=360):
                self._results()
        self.form.follow_method()

    def wire(self) -> None:
        """Connect components with what they do."""
        self.panel.wire(self.request, [self.folder, self.name, *self.form.components])
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        components = {field.name: field.component for field in self.form.fields if field.method is None}
        base, method = (components[name] for name in DEMO_ON)
        self.presets.input(
            self.fill,
            inputs=[self.presets, base],
            outputs=[self.presets, self.panel.message, self.settled, *self.form.components],
            **quiet,
        )
        demo = [field.component for field in self._demo_fields]
        # The user's choices alone: what a preset or an earlier training fills in is meant as it is.
        gr.on(
            [base.input, method.input],
            self.settle,
            inputs=[base, method, self.settled, *demo],
            outputs=[self.settled, *demo],
            **quiet,
        )
        options = [field.component for field in self.form.fields if field.method]
        gr.on(
            [component.change for component in (method, components["optimizer"], *options)],
            self.show_own_rate,
            inputs=self.form.components,
            outputs=components["learning_rate"],
            trigger_mode="always_last",
            **quiet,
        )
        self.drop.change(
            self._take_pictures,
            inputs=self.drop,
            outputs=[*self.set, self.panel.message],
            **quiet,
        )

    def request(self, folder: str | None, name: str, *values: Any) -> Values:
        """Return the specification to queue.

        Raises:
            SpecError: Lists every problem of the form.
            DataError: If there are no pictures.
            UsageError: If the adapter's name is no plain file name.
        """
        request = self.form.read(values)
        if not folder:
            raise DataError("there are no pictures to train on. Drop some first.")
        request["data"] = str(self.space.inside(folder))
        request["output"] = str(self._free_path(name))
        parse_spec(TrainSpec, request)
        return request

    def settle(self, base: str, method: str, before: str, *shown: Any) -> list[Any]:
        """Return the method and updates of the demo's fields after another base or method was chosen.

        The demo's values are for the demo alone, elsewhere those fields are as the specification has them.
        Others, typed or a preset's, stay; but a learning rate goes where the methods' own ones differ, as
        then it means something else.

        Args:
            base: That is chosen.
            method: That is chosen.
            before: The method that the form was last filled or settled for.
            shown: What stands in the demo's fields.
        """
        old, new = (USUAL, DEMO) if is_demo(base, method) else (DEMO, USUAL)
        unlike = own_rate({"method": before}) != own_rate({"method": method})
        return [
            method,
            *(
                gr.update(value=field.write(new[field.name]))
                if value == field.write(old[field.name]) or (unlike and field.name == "learning_rate")
                else gr.skip()
                for field, value in zip(self._demo_fields, shown, strict=True)
            ),
        ]

    @property
    def _demo_fields(self) -> list[Field]:
        """The fields that ``DEMO`` fills in."""
        own = (None, DEMO_ON["method"])
        fields = {field.name: field for field in self.form.fields if field.method in own}
        return [fields[name] for name in DEMO]

    def show_own_rate(self, *values: Any) -> Any:
        """Return an update that shows in the empty field which learning rate is the method's own."""
        return gr.update(placeholder=_automatic(self.form.read(values)))

    def fill(self, names: list[str], base: str) -> list[Any]:
        """Return updates that give the form the values of presets; where none says a value, the first one.

        Args:
            names: Of the presets.
            base: That is chosen.
        """
        try:
            values = preset_values(names, base)
        except StudioError as error:
            return [gr.skip(), notice(str(error)), gr.skip(), *(gr.skip() for _ in self.form.fields)]
        about = " ".join(presets()[name] for name in names) or PRESETS
        return [gr.update(info=about), "", values["method"], *self.form.write(values)]

    @property
    def restored(self) -> list[Any]:
        """What ``restore`` returns updates for."""
        filled = [*self.set, self.name, self.settled, *self.form.components]
        return [*filled, *self.panel.outputs]

    def restore(self) -> list[Any]:
        """Return everything as the newest job left it, for a page that was just loaded."""
        story = self.follower.latest("train")
        if story is None:
            return [*(gr.skip() for _ in range(5 + len(self.form.fields))), *self.panel.refresh({})]
        spec = story.job.spec
        folder, name = Path(spec["data"]), Path(spec["output"]).stem
        filled = [*self._shown(folder), name, method_of(spec), *self.form.write(spec)]
        return [*filled, *self.panel.refresh({})]

    def _pictures(self) -> None:
        self.folder = gr.State(str(self.example) if self.example else None)
        self.heading = gr.HTML(self._heading(self.example))
        self.gallery = gr.Gallery(
            captioned(self.example),
            show_label=False,
            columns=6,
            height="auto",
            object_fit="cover",
            buttons=[],
            interactive=False,
            elem_id="train-set",
            elem_classes="thumbs",
        )
        self.set = [self.folder, self.gallery, self.heading]
        self.drop = gr.File(
            label="Your pictures, captions as .txt files",
            file_count="multiple",
            file_types=[*PICTURES, ".txt"],
            height=140,
            elem_id="train-drop",
        )

    def _fields(self) -> None:
        form = self.form
        self.settled = gr.State(method_of({}))
        form.add("prompt", elem_id="train-prompt")
        self.presets = gr.Dropdown(
            list(presets()),
            value=[],
            multiselect=True,
            label="Presets",
            info=PRESETS,
            elem_id="train-presets",
        )
        with gr.Row(elem_classes="fields"):
            form.add("base", elem_id="train-base", info=None, scale=2, min_width=150)
            form.add("method", elem_id="train-method", info=None, min_width=150)
            self.name = gr.Textbox(
                "robot" if self.example else "adapter",
                label="Adapter name",
                min_width=170,
                elem_id="train-name",
            )
        form.add_about()
        with gr.Row(elem_classes="fields"):
            form.add("steps", elem_id="train-steps", info=None, min_width=110)
            form.add(
                "learning_rate",
                info=None,
                placeholder=_automatic({}),
                # A placeholder that is too long is cut off; a field of several lines would grow.
                max_lines=1,
                elem_id="train-rate",
                min_width=110,
            )
            form.add("batch_size", info=None, min_width=110)
            form.add_options(only=["rank"], container=gr.Column, min_width=110, info=None)
        with gr.Row(elem_classes="fields"):
            form.add("resolution", placeholder="automatic", info=None, min_width=90)
            form.add("seed", info=None, min_width=90)
            form.add("sample_every", elem_id="train-sample-every", info=None, min_width=90)
        with gr.Accordion("More options", open=False):
            with folded("Options of the method"):
                form.add_options()
            form.add_rest(leave_out=["data", "output", "overwrite", "resume"])

    def _results(self) -> None:
        panel = self.panel
        panel.buttons("Train")
        panel.state()
        with gr.Column(visible=False) as losses:
            # Gradio's own label and legend push the axis out of the plot's frame.
            legend = gr.HTML(_legend(None))
            chart = gr.LinePlot(
                x="step",
                y="loss",
                color="curve",
                color_map={"each step": "#c7c9d3", "smoothed": "#5b5bd6", "held out": "#d9772b"},
                x_title="step",
                y_title="loss",
                colors_in_legend=[],
                height=300,
                show_label=False,
                tooltip="axis",
                elem_id="train-chart",
            )
        panel.follow("losses", losses, _learnt, lambda story: gr.update(visible=_learnt(story)))
        panel.follow("legend", legend, _legend, _legend)
        panel.follow(
            "chart",
            chart,
            lambda story: (len(story.losses), len(story.validation)) if story else 0,
            lambda story: story.chart() if story and story.losses else None,
        )
        panel.pictures("Samples", columns=6)
        self.download = gr.File(
            label="Files to download",
            file_count="multiple",
            interactive=False,
            visible=False,
            elem_id="train-download",
        )
        self.use = gr.Button("Draw with it", interactive=False, elem_id="train-use")
        panel.follow("download", self.download, written, _download)
        panel.follow("use", self.use, written, lambda story: gr.update(interactive=bool(written(story))))
        panel.report("Report")

    def _take_pictures(self, uploaded: list[str] | None) -> list[Any]:
        try:
            folder = keep_uploads(self.space, uploaded) if uploaded else self.example
        except StudioError as error:
            return [*self._shown(None), notice(str(error))]
        return [*self._shown(folder), ""]

    def _shown(self, folder: Path | None) -> list[Any]:
        """Return what the components of the set say of a folder of pictures."""
        return [str(folder) if folder else None, captioned(folder), self._heading(folder)]

    def _heading(self, folder: Path | None) -> str:
        example = folder is not None and folder == self.example
        note = ": the example, until you drop your own" if example else ""
        return f"<h2>Pictures to learn<small>{note}</small></h2>"

    def _free_path(self, name: str) -> Path:
        """Return the adapter file of that name, with a number if it exists or another job may write it."""
        if not re.fullmatch(r"[\w][\w .()+-]*", name.strip()):
            raise UsageError(
                f"name of the adapter: use letters, digits, spaces and . - _ ( ) +, got '{name}'."
            )
        # One that ended early keeps its name and its run folder, which a retry goes on from.
        jobs = self.follower.store.list(kind="train")
        taken = {job.spec["output"] for job in jobs if job.state != "done"}
        stem = name.strip().removesuffix(".safetensors")
        number = 1
        while True:
            path = self.space.inside(
                self.space.adapters / f"{stem}{f'-{number}' if number > 1 else ''}.safetensors"
            )
            if not path.exists() and not RunFolder(path).path.exists() and str(path) not in taken:
                return path
            number += 1


def written(story: Story | None) -> dict[str, Path]:
    """Return the files that a training which has ended left of its adapter, by part, its own first."""
    if story is None or story.job.active:
        return {}
    files = {part: path for part, path in story.files.items() if path.is_file()}
    return files if "" in files else {}


def used_together(story: Story | None) -> list[Path]:
    """Return the files to draw with a trained adapter: its own, and those parts that this one lacks."""
    files = written(story)
    if story is None or not files:
        return []
    return [files[part] for part in ("", *TRAINERS[method_of(story.job.spec)].companions) if part in files]


def _automatic(request: Values) -> str:
    """Return what an empty learning rate says in a request."""
    return f"auto: {own_rate(request):.3g}"


def _learnt(story: Story | None) -> bool:
    return story is not None and bool(story.losses)


def _legend(story: Story | None) -> str:
    held_out = ", of pictures held out in orange" if story and story.validation else ""
    return f"<h2>Loss<small>: each step in grey, smoothed in blue{held_out}</small></h2>"


def _download(story: Story | None) -> Any:
    paths = [str(path) for path in written(story).values()]
    return gr.update(value=paths or None, visible=bool(paths))
