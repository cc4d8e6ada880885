"""Customize diffusion models: train adapters, compose several of them, draw pictures with them.

The names below are loaded when they are first used, so that importing this package stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from studio.notices import leave_out_unneeded

if TYPE_CHECKING:
    from studio.api import (
        Result,
        TrainResult,
        compose,
        draw_batch,
        draw_grid,
        generate,
        generate_batch,
        load_adapter,
        load_base,
        save_adapter,
        train,
    )
    from studio.block_probe.probing import probe
    from studio.composing.bake import bake
    from studio.composing.compare import compare
    from studio.composing.document import read_composition, write_composition
    from studio.composing.plan import show_plan
    from studio.composition.profiles import profile
    from studio.data.captioner import caption_folder
    from studio.errors import StudioError
    from studio.merging.merge import MergeResult, merge
    from studio.merging.zip import ZipResult, zip_adapters
    from studio.models.prompt_encoding import reading_prompts
    from studio.presets import preset
    from studio.specs import (
        BatchSpec,
        CompositionSpec,
        GenerateSpec,
        GridSpec,
        MergeSpec,
        ProbeSpec,
        TrainSpec,
        ZipSpec,
    )
    from studio.specs.composing import BakeSpec, CompareSpec, PlanSpec

leave_out_unneeded()

__version__ = "0.1.0"

__all__ = [
    "BakeSpec",
    "BatchSpec",
    "CompareSpec",
    "CompositionSpec",
    "GenerateSpec",
    "GridSpec",
    "MergeResult",
    "MergeSpec",
    "PlanSpec",
    "ProbeSpec",
    "Result",
    "StudioError",
    "TrainResult",
    "TrainSpec",
    "ZipResult",
    "ZipSpec",
    "bake",
    "caption_folder",
    "compare",
    "compose",
    "draw_batch",
    "draw_grid",
    "generate",
    "generate_batch",
    "load_adapter",
    "load_base",
    "merge",
    "preset",
    "probe",
    "profile",
    "read_composition",
    "reading_prompts",
    "save_adapter",
    "show_plan",
    "train",
    "write_composition",
    "zip_adapters",
]

_HOMES = {
    "BakeSpec": "studio.specs.composing",
    "BatchSpec": "studio.specs",
    "CompareSpec": "studio.specs.composing",
    "CompositionSpec": "studio.specs",
    "GenerateSpec": "studio.specs",
    "GridSpec": "studio.specs",
    "MergeResult": "studio.merging.merge",
    "MergeSpec": "studio.specs",
    "PlanSpec": "studio.specs.composing",
    "ProbeSpec": "studio.specs",
    "StudioError": "studio.errors",
    "TrainSpec": "studio.specs",
    "ZipResult": "studio.merging.zip",
    "ZipSpec": "studio.specs",
    "bake": "studio.composing.bake",
    "caption_folder": "studio.data.captioner",
    "compare": "studio.composing.compare",
    "merge": "studio.merging.merge",
    "preset": "studio.presets",
    "probe": "studio.block_probe.probing",
    "profile": "studio.composition.profiles",
    "read_composition": "studio.composing.document",
    "reading_prompts": "studio.models.prompt_encoding",
    "show_plan": "studio.composing.plan",
    "write_composition": "studio.composing.document",
    "zip_adapters": "studio.merging.zip",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'studio' has no attribute '{name}'")
    value = getattr(import_module(_HOMES.get(name, "studio.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
