"""Make one ordinary adapter of a composition, and say how far it is from it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.adapters.adapter import Adapter
from studio.adapters.container import check_target
from studio.adapters.files import load_adapter, usual_dtype
from studio.adapters.merge import merge_adapters
from studio.adapters.parameters import components_of, find_parameter
from studio.bases import cached_base, known_fingerprint
from studio.composing.average import Average
from studio.composing.planning import (
    MEASURE,
    load_adapters,
    plan_of,
    reads_prompt,
    tell_differences,
    weights_of,
)
from studio.composition.engine import compose
from studio.composition.fit import tokens_of
from studio.errors import BaseNeeded
from studio.generation import Settings, draw, quiet
from studio.merging.merge import check_without_base
from studio.merging.outputs import described, inherited_facts, write_with_tokens
from studio.merging.report import MergeReport, report_of
from studio.models.device import resolve_dtype
from studio.models.prompt_encoding import reading_prompts
from studio.registry import MERGERS
from studio.specs import Event, OnEvent, adapter_names
from studio.specs.composing import BakeSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """How much pictures differ: mean absolute difference of their values, as a share of the full scale.

    Attributes:
        baked: Of the one adapter's from the composition's.
        base: Of the base's, without adapters, from the composition's.
    """

    baked: float
    base: float


@dataclass(frozen=True)
class BakeResult:
    """What baking made.

    Attributes:
        adapter: As it stands in the file.
        paths: The file and one for each new token beside it.
        report: What merging the means lost by the rank.
        weights: Distance of the file's weights from those of the steps, see ``Average.distance``.
        pictures: Distance of the pictures, where some were drawn.
        lost: What the composition does that no file holds.
    """

    adapter: Adapter
    paths: tuple[Path, ...]
    report: MergeReport
    weights: float
    pictures: Distance | None
    lost: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the result in words."""
        lines = [
            f"weights: relative distance {self.weights:.4f} from the composition's over its steps "
            f"({self.report.whole.error:.4f} of the mean is lost by the rank)"
        ]
        if self.pictures:
            lines.append(
                f"pictures: mean difference {self.pictures.baked:.4f} from the composition's; without "
                f"adapters it is {self.pictures.base:.4f}"
            )
        return [*lines, *(f"left out: {what}" for what in self.lost)]


def bake(spec: BakeSpec, *, on_event: OnEvent | None = None) -> BakeResult:
    """Write one adapter that has the composition's mean weights over a run.

    Per parameter the mean of each adapter's weight, share by share and step by step, in the rows of the
    prompt; then their sum, exactly or at a rank.

    Args:
        spec: The request.
        on_event: Told of progress, of what a person should know, and of each file.

    Raises:
        AdapterError: If an adapter cannot be read, does not fit, or needs the base.
        CompositionError: If no adapter file can hold what the composition does.
        OutputError: If the file exists or cannot be written.
    """

    def tell(event: Event) -> None:
        if on_event:
            on_event(event)

    def progress(done: int, total: int) -> None:
        tell(Event(kind="progress", step=done, total=total))

    check_target(spec.output, overwrite=spec.overwrite)
    tell_differences(spec, tell)
    loaded = spec.measure or bool(spec.prompts)
    pipe = cached_base(spec.base, spec.device, "auto", on_event=tell) if loaded else None
    try:
        planned = plan_of(
            spec,
            pipe,
            prompt=spec.prompts[0] if spec.prompts else None,
            fingerprint=None if loaded else known_fingerprint(spec.base, spec.device, "auto"),
        )
    except BaseNeeded as error:
        raise BaseNeeded(f"{error} {MEASURE}") from None
    tokens = tokens_of(planned.adapters, {name: planned.weights.get(name, 1.0) for name in planned.adapters})
    average = Average(planned.plan, planned.adapters, total=spec.steps)
    if reads_prompt(spec) and not spec.prompts:
        message = "the plan depends on the prompt; baked is the one without. Give --prompt."
        tell(Event(kind="message", message=message))
    layered = {name: adapter for name, adapter in planned.adapters.items() if adapter.changes}
    if pipe is None:
        check_without_base(layered, remedy="Give --measure, which loads it.")
    parameter = _reader(pipe) if pipe is not None else None
    merger = MERGERS["linear"]() if spec.max_rank is None else MERGERS["svd"](rank=spec.max_rank)
    merged = merge_adapters(
        *average.adapters(), merger, name=spec.output.stem, parameter=parameter, on_layer=progress
    )
    dtype = usual_dtype(merged.adapter) if spec.precision == "auto" else resolve_dtype(spec.precision)
    facts = inherited_facts(layered.values(), pipe, tell=tell) | _recipe(spec)
    adapter = replace(merged.adapter, tokens=tokens, metadata=facts)
    paths = write_with_tokens(
        adapter, spec.output, format=spec.format, dtype=dtype, pipe=pipe, overwrite=spec.overwrite
    )
    for path in paths:
        tell(Event(kind="saved", path=path, message=f"wrote {path}"))
    written = load_adapter(spec.output, base=pipe)
    return BakeResult(
        replace(written, tokens=tokens),
        paths,
        report_of(merged, dtype=dtype, format=spec.format),
        average.distance(written.changes, parameter=parameter, on_layer=progress),
        _pictures(spec, pipe, replace(written, tokens=tokens)) if spec.prompts and pipe is not None else None,
        tuple(average.lost()),
    )


def _reader(pipe: "DiffusionPipeline") -> "Callable[[str], Tensor]":
    components = components_of(pipe)
    return lambda name: find_parameter(components, name).detach().cpu()


def _recipe(spec: BakeSpec) -> dict[str, str]:
    uses = dict(zip(adapter_names(spec.adapters), spec.adapters, strict=True))
    recipe = {
        "method": spec.method,
        "options": spec.options.model_dump(mode="json"),
        "modifiers": {name: given.model_dump(mode="json") for name, given in spec.modifiers.items()},
        "steps": spec.steps,
        "max_rank": spec.max_rank,
        "adapters": described(uses),
    }
    return {"studio.bake": json.dumps(recipe, sort_keys=True)}


def _pictures(spec: BakeSpec, pipe: "DiffusionPipeline", baked: Adapter) -> Distance:
    """Return how far the pictures of the one adapter, and of none, are from the composition's."""

    def drawn(adapters: Mapping[str, Adapter], **how: Any) -> "list[Image]":
        with reading_prompts(pipe), compose(pipe, adapters, **how):
            return [
                draw(pipe, [prompt], [seed], settings=Settings(steps=spec.steps))[0]
                for prompt in spec.prompts
                for seed in spec.seeds
            ]

    with quiet(pipe):
        live = drawn(
            load_adapters(spec, pipe),
            method=spec.method,
            weights=weights_of(spec),
            options=spec.options,
            modifiers=spec.modifiers,
        )
        return Distance(_difference(drawn({"baked": baked}), live), _difference(drawn({}), live))


def _difference(ones: "list[Image]", others: "list[Image]") -> float:
    import numpy as np

    pairs = zip(ones, others, strict=True)
    differences = [np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() for one, other in pairs]
    return float(np.mean(differences)) / 255
