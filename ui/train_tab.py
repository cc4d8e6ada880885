"""The tab that trains an adapter on pictures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio.errors import DataError, StudioError, UsageError
from studio.presets import preset, presets
from studio.specs import TrainSpec, parse_spec, settable
from studio.trainers.run_folder import RunFolder
from studio.ui.follow import Follower, Story, notice
from studio.ui.forms import Form, Values, folded
from studio.ui.panel import Panel, existing
from studio.ui.pictures import PICTURES, captioned, example_set, keep_uploads
from studio.workspace import Workspace

START: Values = {
    "prompt": "a photo of sks robot",
    "steps": 200,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "rank": 8,
    "sample_every": 50,
    # For a retry after the worker was killed; on a stop and on most errors a checkpoint is written anyway.
    "checkpoint_every": 100,
}
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
        self.form = Form(TrainSpec, START)
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
        self.presets.input(
            self.fill,
            inputs=self.presets,
            outputs=[self.presets, self.panel.message, *self.form.components],
            show_progress="hidden",
            api_visibility="private",
        )
        self.drop.change(
            self._take_pictures,
            inputs=self.drop,
            outputs=[self.folder, self.gallery, self.panel.message],
            show_progress="hidden",
            api_visibility="private",
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

    def fill(self, names: list[str]) -> list[Any]:
        """Return updates that give the form the values of presets; where none says a value, the first one."""
        try:
            values = _preset_values(names)
        except StudioError as error:
            return [gr.skip(), notice(str(error)), *(gr.skip() for _ in self.form.fields)]
        about = " ".join(presets()[name] for name in names) or PRESETS
        return [gr.update(info=about), "", *self.form.write(values)]

    @property
    def restored(self) -> list[Any]:
        """What ``restore`` returns updates for."""
        return [self.folder, self.gallery, self.name, *self.form.components, *self.panel.outputs]

    def restore(self) -> list[Any]:
        """Return everything as the newest job left it, for a page that was just loaded."""
        story = self.follower.latest("train")
        if story is None:
            return [*(gr.skip() for _ in range(3 + len(self.form.fields))), *self.panel.refresh({})]
        spec = story.job.spec
        folder, name = Path(spec["data"]), Path(spec["output"]).stem
        return [str(folder), captioned(folder), name, *self.form.write(spec), *self.panel.refresh({})]

    def _pictures(self) -> None:
        self.folder = gr.State(str(self.example) if self.example else None)
        example = ": the example, until you drop your own" if self.example else ""
        gr.HTML(f"<h2>Pictures to learn<small>{example}</small></h2>")
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
        self.drop = gr.File(
            label="Your pictures, captions as .txt files",
            file_count="multiple",
            file_types=[*PICTURES, ".txt"],
            height=140,
            elem_id="train-drop",
        )

    def _fields(self) -> None:
        form = self.form
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
            form.add("method", info=None, min_width=150)
            self.name = gr.Textbox(
                "robot" if self.example else "adapter",
                label="Adapter name",
                min_width=170,
                elem_id="train-name",
            )
        form.add_about()
        with gr.Row(elem_classes="fields"):
            form.add("steps", elem_id="train-steps", info=None, min_width=110)
            form.add("learning_rate", info=None, min_width=110)
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
            gr.HTML("<h2>Loss<small>: each step in grey, smoothed in blue</small></h2>")
            chart = gr.LinePlot(
                x="step",
                y="loss",
                color="curve",
                color_map={"each step": "#c7c9d3", "smoothed": "#5b5bd6"},
                x_title="step",
                y_title="loss",
                colors_in_legend=[],
                height=300,
                show_label=False,
                tooltip="axis",
                elem_id="train-chart",
            )
        panel.follow("losses", losses, _learnt, lambda story: gr.update(visible=_learnt(story)))
        panel.follow(
            "chart",
            chart,
            lambda story: (story.job.id, story.job.attempt, len(story.losses)) if story else 0,
            lambda story: story.chart() if story and story.losses else None,
        )
        panel.pictures("Samples", columns=6)
        with gr.Row(elem_classes="buttons"):
            self.download = gr.DownloadButton("Download", interactive=False, elem_id="train-download")
            self.use = gr.Button("Draw with it", interactive=False, elem_id="train-use")
        panel.follow("download", self.download, _adapter, _download)
        panel.follow("use", self.use, _adapter, lambda story: gr.update(interactive=bool(_adapter(story))))
        panel.report("Report")

    def _take_pictures(self, uploaded: list[str] | None) -> tuple[Any, Any, Any]:
        try:
            folder = keep_uploads(self.space, uploaded) if uploaded else self.example
        except StudioError as error:
            return None, [], notice(str(error))
        return str(folder) if folder else None, captioned(folder), ""

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


def _preset_values(names: list[str]) -> Values:
    """Return values for all fields that any preset sets: those of these presets, else as the page opens."""
    chosen = preset(*names)
    known = settable(TrainSpec, chosen.get("method"))
    start = {name: value for name, value in START.items() if name in known}
    spec = parse_spec(TrainSpec, {**start, **chosen, "data": "pictures", "output": "adapter.safetensors"})
    values = spec.model_dump()
    values |= values.pop("options")
    touched = {name for each in presets() for name in preset(each)}
    return {name: value for name, value in values.items() if name in touched}


def _learnt(story: Story | None) -> bool:
    return story is not None and bool(story.losses)


def _adapter(story: Story | None) -> str | None:
    return existing(story.adapter) if story and not story.job.active else None


def _download(story: Story | None) -> Any:
    path = _adapter(story)
    label = f"Download {Path(path).name}" if path else "Download"
    return gr.update(label=label, value=path, interactive=bool(path))
