"""The tab that draws pictures with adapters."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio.composing.document import read_composition, write_composition
from studio.errors import StudioError, UsageError
from studio.png import read_spec
from studio.specs import AdapterUse, CompositionSpec, GenerateSpec, adapter_names, parse_spec
from studio.ui.compare import CompareView
from studio.ui.follow import Follower, Story, notice
from studio.ui.forms import Form, Values
from studio.ui.modifiers import ModifierFields
from studio.ui.panel import Panel
from studio.ui.pictures import unique
from studio.ui.plan import PlanView
from studio.ui.regions import METHOD as BY_REGIONS
from studio.ui.regions import RegionFields
from studio.ui.sketches import Sketch
from studio.workspace import Workspace

START: Values = {"prompt": "a photo of a fox on a blue background", "count": 4}
IDLE = '<div class="idle">Press <b>Generate</b> to draw the prompt on the left.</div>'
MAX_ADAPTERS = 8


class GenerateTab:
    """Form on the left, pictures on the right.

    Args:
        space: Where adapters and pictures lie.
        follower: Reads the jobs.
        trouble: Returns why the worker does nothing at the moment.
    """

    def __init__(self, space: Workspace, follower: Follower, trouble: Callable[[], str]) -> None:
        self.space, self.follower = space, follower
        self.form = Form(GenerateSpec, START)
        self.modifiers = ModifierFields()
        self.regions = RegionFields(space, MAX_ADAPTERS)
        self.panel = Panel("generate", follower, trouble, idle=IDLE)
        self.compare = CompareView(space, follower, trouble)
        self.plan = PlanView(space, follower, trouble)
        self.sketches: tuple[Sketch, ...] = (self.compare, self.plan)

    def layout(self) -> None:
        """Place all components."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._fields()
            with gr.Column(scale=6, min_width=360):
                self.panel.buttons("Generate")
                self.panel.state()
                self.panel.pictures("Pictures", columns=4)
                self.panel.report("Messages")
                for sketch in self.sketches:
                    sketch.layout()
                with gr.Accordion("Save or restore settings", open=False, elem_id="settings"):
                    self._settings()
        self.form.follow_method()

    def wire(self) -> None:
        """Connect components with what they do."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.panel.wire(self.request, self.request_inputs)
        for sketch in self.sketches:
            sketch.wire(self.request, self.request_inputs)
        self.regions.wire()
        self.chosen.input(
            self._choose,
            inputs=[self.chosen, self.named, *self.sliders, *self.regions.masks],
            outputs=[self.named, *self.sliders, *self.regions.outputs],
            **quiet,
        )
        self.add.upload(
            self._keep_adapter, inputs=self.add, outputs=[self.chosen, self.panel.message], **quiet
        )
        self.drop.upload(
            self._restore,
            inputs=self.drop,
            outputs=[self.panel.message, *self.request_outputs],
            **quiet,
        )

        self.save.click(
            self._save,
            inputs=self.request_inputs,
            outputs=[self.saved, self.panel.message],
            **quiet,
        )

    def request(self, expected: dict[str, str], chosen: list[str] | None, *values: Any) -> Values:
        """Return the specification to queue.

        Args:
            expected: Hashes of the picture whose settings stand in the form, by base and adapter.
            chosen: Names of adapters.
            values: Of their sliders, of the modifiers' fields, of the form's fields and of the regions.

        Raises:
            SpecError: Lists every problem of the form.
            AdapterError: If an adapter's file is gone.
        """
        names = chosen or []
        weights, fields = values[:MAX_ADAPTERS], values[MAX_ADAPTERS:]
        begin = len(self.modifiers.components)
        end = begin + len(self.form.components)
        request = self.form.read(fields[begin:end])
        request["modifiers"] = self.modifiers.read(fields[:begin])
        request["adapters"] = [
            {"path": str(self._adapter_path(name)), "weight": weight}
            for name, weight in zip(names, weights, strict=False)
        ]
        if request["method"] == BY_REGIONS:
            request["regions"] = self._masks(request["adapters"], fields[end:])
        request["expected_hashes"] = expected
        request["output"] = str(self.space.inside(self.space.pictures / unique("pictures")))
        parse_spec(GenerateSpec, request)
        return request

    @property
    def request_inputs(self) -> list[Any]:
        """What ``request`` takes the values of."""
        return [
            self.expected,
            self.chosen,
            *self.sliders,
            *self.modifiers.components,
            *self.form.components,
            *self.regions.masks,
        ]

    @property
    def request_outputs(self) -> list[Any]:
        """What ``show`` returns updates for."""
        expected, chosen, *others = self.request_inputs
        return [expected, chosen, self.named, *others, *self.regions.takers]

    def show(self, request: Values) -> list[Any]:
        """Return the form filled with a request; adapters outside the workspace are left out."""
        uses = {self._name(use["path"]): float(use["weight"]) for use in request.get("adapters", ())}
        names = [name for name in uses if name in self.adapter_names()][:MAX_ADAPTERS]
        chosen = gr.update(value=names, choices=self.adapter_names())
        expected = request.get("expected_hashes", {})
        sliders, modifiers = _slider_updates(names, uses), self.modifiers.write(request.get("modifiers"))
        regions = self.regions.write(names, self._mask_files(request, names))
        return [expected, chosen, names, *sliders, *modifiers, *self.form.write(request), *regions]

    def use(self, adapters: Sequence[Path], prompt: str | None, base: str) -> list[Any]:
        """Return the form set to draw with a trained adapter, of one or several files."""
        uses = [{"path": str(path), "weight": 1.0} for path in adapters]
        request: Values = {"adapters": uses, "base": base}
        return self.show(request | ({"prompt": prompt} if prompt else {}))

    @property
    def restored(self) -> list[Any]:
        """What ``restore`` returns updates for."""
        panels = [self.panel, *(sketch.panel for sketch in self.sketches)]
        return [*self.request_outputs, *(output for panel in panels for output in panel.outputs)]

    def restore(self) -> list[Any]:
        """Return everything as the newest job left it, for a page that was just loaded."""
        story = self.follower.latest("generate")
        request = story.job.spec if story else {}
        panels = [self.panel, *(sketch.panel for sketch in self.sketches)]
        return [*self.show(request), *(update for panel in panels for update in panel.refresh({}))]

    def adapter_names(self) -> list[str]:
        """Return the workspace's adapters, the newest first, by their path below its folder of adapters."""
        files = [path for path in self.space.adapters.rglob("*.safetensors") if path.is_file()]
        files.sort(key=lambda path: (-path.stat().st_mtime, path.name))
        return [path.relative_to(self.space.adapters).as_posix() for path in files]

    def _settings(self) -> None:
        self.drop = gr.File(
            label="A picture made here, or a composition (.toml): fills the form as it was",
            file_types=[".png", ".toml"],
            height=140,
            elem_id="generate-drop",
        )
        with gr.Row(elem_classes="buttons"):
            self.save = gr.Button("Save as a composition", elem_id="generate-save")
            self.saved = gr.File(
                label="Composition", visible=False, interactive=False, height=60, elem_id="generate-saved"
            )

    def _fields(self) -> None:
        form = self.form
        form.add("prompt", elem_id="generate-prompt", lines=2)
        form.add("negative_prompt", info=None, placeholder="What to steer away from")
        with gr.Row(elem_classes="adapters"):
            self.chosen = gr.Dropdown(
                self.adapter_names(),
                value=[],
                multiselect=True,
                max_choices=MAX_ADAPTERS,
                label="Adapters",
                info="What you train appears here by itself.",
                elem_id="generate-adapters",
                scale=4,
            )
            self.add = gr.UploadButton(
                "Add a file", file_types=[".safetensors"], scale=1, min_width=100, size="sm"
            )
        self.named = gr.State([])
        self.expected = gr.State({})
        with gr.Row(elem_classes=["fields", "sliders"]):
            self.sliders = [
                gr.Slider(
                    -2, 2, value=1.0, step=0.05, visible=False, min_width=220, label=f"Weight {number + 1}"
                )
                for number in range(MAX_ADAPTERS)
            ]
        self.panel.follow(
            "adapters", self.chosen, self._offer, lambda _: gr.update(choices=self.adapter_names())
        )
        with gr.Row(elem_classes="fields"):
            form.add("base", info=None, elem_id="generate-base", scale=2, min_width=150)
            form.add("method", info=None, min_width=150, elem_id="generate-method")
        form.add_about()
        form.show_with(BY_REGIONS, self.regions.layout())
        with gr.Accordion("Options of the method", open=False, elem_id="generate-options"):
            form.add_options()
        with gr.Row(elem_classes="fields"):
            form.add("seed", elem_id="generate-seed", info=None, min_width=100)
            form.add("count", elem_id="generate-count", info=None, min_width=100)
            form.add("steps", elem_id="generate-steps", info=None, min_width=100)
            form.add("guidance_scale", info=None, min_width=100)
        with gr.Row(elem_classes="fields"):
            form.add("width", placeholder="automatic", info=None, min_width=90)
            form.add("height", placeholder="automatic", info=None, min_width=90)
            form.add("scheduler", info=None, min_width=120)
        with gr.Accordion("Modifiers", open=False):
            self.modifiers.layout()
        with gr.Accordion("More options", open=False):
            form.add_rest(leave_out=["adapters", "adapter_folder", "output", "overwrite", "expected_hashes"])

    def _offer(self, _: Story | None) -> tuple[str, ...]:
        return tuple(self.adapter_names())

    def _choose(self, chosen: list[str] | None, before: list[str], *values: Any) -> list[Any]:
        """Show a slider and a region per chosen adapter; those chosen before keep their own."""
        names, weights, painted = chosen or [], values[:MAX_ADAPTERS], values[MAX_ADAPTERS:]
        regions = self.regions.choose(names, before, painted)
        return [names, *_slider_updates(names, dict(zip(before, weights, strict=False))), *regions]

    def _masks(self, uses: Sequence[Values], painted: Sequence[Any]) -> dict[str, str]:
        """Return what is painted, as option ``regions`` wants it."""
        masks = self.regions.read(_option_names(uses), painted)
        if not masks:
            raise UsageError(
                "no adapter has a region. Choose adapters; drop a mask for each, or paint one and press Use."
            )
        return masks

    def _mask_files(self, request: Values, names: Sequence[str]) -> list[str | None]:
        """Return the mask of each chosen adapter in a request, or None where it has none."""
        options = dict(request.get("options") or {}) | dict(request)
        masks, uses = options.get("regions") or {}, request.get("adapters", ())
        found = {
            self._name(use["path"]): masks.get(name)
            for name, use in zip(_option_names(uses), uses, strict=True)
        }
        return [str(found[name]) if found[name] else None for name in names]

    def _keep_adapter(self, uploaded: str) -> tuple[Any, str]:
        target = self.space.inside(self.space.adapters / Path(uploaded).name)
        if target.exists():
            return gr.skip(), notice(f"'{target.name}' exists among the adapters. Rename the file.")
        shutil.copyfile(uploaded, target)
        return gr.update(choices=self.adapter_names()), notice(f"Added {target.name}.", bad=False)

    def _restore(self, uploaded: str) -> list[Any]:
        """Fill the form with a picture's settings, or the part of it that a composition speaks of."""
        file = Path(uploaded)
        try:
            composition = file.suffix == ".toml"
            spec = read_composition(file, home=self.space.adapters) if composition else read_spec(file)
        except StudioError as error:
            return [notice(" · ".join(str(error).splitlines())), *(gr.skip() for _ in self.request_outputs)]
        # What a composition does not say is as it is by default, not as it was in the form.
        names = {*spec.model_fields_set, *CompositionSpec.model_fields}
        request = {name: getattr(spec, name) for name in names} | spec.options.model_dump()
        request["adapters"] = [use.model_dump() for use in spec.adapters]
        request["modifiers"] = {name: given.model_dump() for name, given in spec.modifiers.items()}
        missing = [str(use.path) for use in spec.adapters if self._name(use.path) not in self.adapter_names()]
        message = f"Settings of {file.name} restored."
        if missing:
            message += f" Not in this workspace, add them: {', '.join(missing)}."
        called = {use.name: use.path.stem for use in spec.adapters if use.name not in ("", use.path.stem)}
        if called:
            names_here = ", ".join(f"'{name}' is '{stem}'" for name, stem in called.items())
            message += f" Here adapters go by their files' names: {names_here}."
        return [notice(message, bad=bool(missing or called)), *self.show(request)]

    def _save(self, *values: Any) -> list[Any]:
        """Write the form's composition beside the adapters: its paths hold wherever they go together."""
        try:
            spec = parse_spec(GenerateSpec, self.request(*values))
            name = "+".join(adapter_names(spec.adapters)) or spec.method
            file = self.space.inside(self.space.adapters / f"{unique(name)}.toml")
            write_composition(spec, file)
        except StudioError as error:
            return [gr.skip(), notice(" · ".join(str(error).splitlines()))]
        return [gr.update(value=str(file), visible=True), notice(f"Wrote {file.name}.", bad=False)]

    def _adapter_path(self, name: str) -> Path:
        path = self.space.inside(self.space.adapters / name)
        if not path.is_file():
            raise UsageError(
                f"adapters: there is no '{name}' in {self.space.adapters} any more. Take it off the list."
            )
        return path

    def _name(self, path: str | Path) -> str:
        """Return an adapter's name on the list; a file that lies elsewhere keeps its path."""
        full = Path(path)
        inside = full.is_relative_to(self.space.adapters)
        return full.relative_to(self.space.adapters).as_posix() if inside else str(path)


def _option_names(uses: Sequence[Values]) -> list[str]:
    """Return the names by which options speak of a request's adapters."""
    return adapter_names([AdapterUse.model_validate(use) for use in uses])


def _slider_updates(names: Sequence[str], weights: dict[str, float]) -> list[Any]:
    return [
        gr.update(visible=True, label=f"Weight of {names[index]}", value=weights.get(names[index], 1.0))
        if index < len(names)
        else gr.update(visible=False)
        for index in range(MAX_ADAPTERS)
    ]
