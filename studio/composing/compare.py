"""Draw the same pictures by several composition methods, side by side, and say what each costs."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from studio.adapters.adapter import Adapter
from studio.bases import base_to_draw, execution
from studio.composing.planning import load_adapters, weights_of
from studio.composition.cost import PictureCost
from studio.composition.engine import Composition, compose
from studio.drawing import check_writable
from studio.errors import StudioError
from studio.generation import Settings, Stopped, draw, quiet, solver
from studio.models.prompt_encoding import reading_prompts
from studio.plots import GridRow, draw_grid
from studio.prompt_settings import settled
from studio.provenance import differences, facts_of
from studio.specs import Event, GenerateSpec, OnEvent
from studio.specs.composing import CompareSpec
from studio.whole_file import whole_file

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

BASE = "base"
"""The first row: no adapters, no modifiers."""
_SIDE, _SMALLEST = 256, 128


@dataclass(frozen=True)
class CompareRow:
    """What a method cost.

    Attributes:
        method: Its name; "base" for the base alone.
        seconds: Time per picture.
        preparing: Seconds before the first picture: forming and measuring adapters.
        evaluations: Rows that the denoiser evaluated, as a multiple of the base's.
        cached: Share of them with deep features of an earlier step.
        operations: Multiply-accumulates of the denoiser, as a multiple of the base's.
        refusal: Why there are no pictures; empty where there are.
    """

    method: str
    seconds: float = 0.0
    preparing: float = 0.0
    evaluations: float = 0.0
    cached: float = 0.0
    operations: float = 0.0
    refusal: str = ""

    def note(self) -> str:
        """Return the row in words."""
        if self.refusal:
            return f"refused: {self.refusal}"
        cached = f", {self.cached:.0%} of them cached: {self.operations:.2f} x its operations"
        evaluations = f"{self.evaluations:.2f} x the base's evaluations"
        return f"{self.seconds:.2f} s a picture, {evaluations}{cached if self.cached else ''}"


@dataclass(frozen=True)
class CompareReport:
    """What a comparison made.

    Attributes:
        rows: The base's first.
        grid: The picture.
        table: The numbers, JSON.
    """

    rows: tuple[CompareRow, ...]
    grid: Path
    table: Path

    def lines(self) -> list[str]:
        """Return a line for each method."""
        width = max(len(row.method) for row in self.rows)
        return [f"{row.method:<{width}}  {row.note()}" for row in self.rows]


def compare(
    spec: CompareSpec, *, on_event: OnEvent | None = None, stop: Callable[[], bool] | None = None
) -> CompareReport:
    """Draw with each method, the base first, and write the grid and the numbers.

    A method that refuses the adapters has a row that says why. A first step that is not counted warms the
    device up.

    Args:
        spec: The request.
        on_event: Told of progress in denoising steps, and of a base or adapter whose hash is not the expected
            one.
        stop: Asked between denoising steps; what is finished by then is written.

    Raises:
        OutputError: If a file exists or cannot be written.
        BaseModelError: If the base cannot be loaded.
        AdapterError: If an adapter cannot be read or does not fit.
    """

    def tell(event: Event) -> None:
        if on_event:
            on_event(event)

    table = spec.grid.with_suffix(".json")
    for path in (spec.grid, table):
        check_writable(path, overwrite=spec.overwrite)
    request = settled(spec.request())
    with ExitStack() as stack:
        pipe = base_to_draw(request, tell)
        stack.enter_context(quiet(pipe))
        sampler = stack.enter_context(solver(pipe, request.scheduler))
        facts = facts_of(pipe, request, sampler=sampler)
        for line in differences(request, facts):
            tell(Event(kind="message", message=line))
        contest = _Contest(spec, request, pipe, load_adapters(request, pipe), tell, stop)
        stack.enter_context(execution(pipe, request))
        stack.enter_context(reading_prompts(pipe, raw=request.raw_prompt))
        contest.run()
    document = {
        "spec": spec.model_dump(mode="json", exclude={"overwrite"}),
        "facts": asdict(facts),
        "device": str(pipe.device),
        "rows": [asdict(row) for row in contest.rows],
    }
    with whole_file(spec.grid) as picture, whole_file(table) as text:
        contest.grid().save(picture, format="PNG", optimize=True)
        text.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tell(Event(kind="finished", path=spec.grid))
    return CompareReport(tuple(contest.rows), spec.grid, table)


class _Contest:
    """Draws one method after the other on one base."""

    def __init__(
        self,
        spec: CompareSpec,
        request: GenerateSpec,
        pipe: "DiffusionPipeline",
        adapters: Mapping[str, Adapter],
        tell: OnEvent,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.rows: list[CompareRow] = []
        self._pictures: list[Sequence[Image]] = []
        self._spec, self._request, self._pipe, self._adapters = spec, request, pipe, adapters
        self._tell, self._stop = tell, stop

    def run(self) -> None:
        """Draw all rows, or as many as there is time for."""
        request, seeds = self._request, self._spec.seeds
        self._draw(seeds[:1], _settings(request, steps=1), lambda _: None)
        methods = (BASE, *self._spec.methods)
        each = request.steps * len(seeds)
        for place, method in enumerate(methods):

            def report(done: int, before: int = place * each) -> None:
                self._tell(Event(kind="progress", step=before + done, total=each * len(methods)))

            try:
                self._add(*self._drawn(method, report))
            except Stopped:
                self._tell(Event(kind="message", message=f"stopped before '{method}' was done"))
                return
            except StudioError as error:
                self._add(CompareRow(method, refusal=" ".join(str(error).split())), ())
                report(each)

    def grid(self) -> "Image":
        """Return the picture of all rows."""
        widest = max((image.width for drawn in self._pictures for image in drawn), default=_SIDE)
        return draw_grid(
            [
                GridRow(row.method, drawn, row.note())
                for row, drawn in zip(self.rows, self._pictures, strict=True)
            ],
            [f"seed {seed}" for seed in self._spec.seeds],
            side=max(_SMALLEST, min(_SIDE, widest)),
        )

    def _add(self, row: CompareRow, drawn: "Sequence[Image]") -> None:
        self.rows.append(row)
        self._pictures.append(drawn)

    def _drawn(self, method: str, report: Callable[[int], None]) -> "tuple[CompareRow, Sequence[Image]]":
        start = time.perf_counter()
        with self._composed(method) as composition:
            prepared = time.perf_counter()
            images = self._draw(self._spec.seeds, _settings(self._request), report)
            done = time.perf_counter()
            passes = composition.passes
            cost = PictureCost(self._pipe, composition).take(
                len(images), height=images[0].height, width=images[0].width
            )
        evaluations = (passes.full + passes.shallow) / passes.asked
        row = CompareRow(
            method,
            seconds=(done - prepared) / len(images),
            preparing=prepared - start,
            evaluations=evaluations,
            cached=cost.cached_share if cost else 0.0,
            operations=cost.ratio if cost else evaluations,
        )
        return row, images

    def _composed(self, method: str) -> Composition:
        if method == BASE:
            return compose(self._pipe, {})
        return compose(
            self._pipe,
            self._adapters,
            method=method,
            weights=weights_of(self._request),
            options=self._spec.method_options.get(method, {}),
            modifiers=self._spec.modifiers,
        )

    def _draw(self, seeds: Sequence[int], settings: Settings, report: Callable[[int], None]) -> "list[Image]":
        size = self._request.batch_size
        images: list[Image] = []
        for start in range(0, len(seeds), size):
            batch = seeds[start : start + size]

            def told(done: int, start: int = start, count: int = len(batch)) -> None:
                report(settings.steps * start + done * count)

            images += draw(
                self._pipe,
                [self._request.prompt] * len(batch),
                batch,
                settings=settings,
                on_step=told,
                stop=self._stop,
            )
        return images


def _settings(request: GenerateSpec, *, steps: int | None = None) -> Settings:
    settings = Settings.of(request)
    return replace(settings, steps=steps) if steps else settings
