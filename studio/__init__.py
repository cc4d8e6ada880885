"""Customize diffusion models: train adapters, compose several of them, draw pictures with them.

The names below are loaded when they are first used, so that importing this package stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.api import (
        Result,
        TrainResult,
        compose,
        generate,
        generate_batch,
        load_adapter,
        load_base,
        save_adapter,
        train,
    )
    from studio.block_probe.probing import probe
    from studio.data.captioner import caption_folder
    from studio.errors import StudioError
    from studio.merging.merge import MergeResult, merge
    from studio.presets import preset
    from studio.specs import GenerateSpec, MergeSpec, ProbeSpec, TrainSpec

__version__ = "0.1.0"

__all__ = [
    "GenerateSpec",
    "MergeResult",
    "MergeSpec",
    "ProbeSpec",
    "Result",
    "StudioError",
    "TrainResult",
    "TrainSpec",
    "caption_folder",
    "compose",
    "generate",
    "generate_batch",
    "load_adapter",
    "load_base",
    "merge",
    "preset",
    "probe",
    "save_adapter",
    "train",
]

_HOMES = {
    "GenerateSpec": "studio.specs",
    "MergeResult": "studio.merging.merge",
    "MergeSpec": "studio.specs",
    "ProbeSpec": "studio.specs",
    "StudioError": "studio.errors",
    "TrainSpec": "studio.specs",
    "caption_folder": "studio.data.captioner",
    "merge": "studio.merging.merge",
    "preset": "studio.presets",
    "probe": "studio.block_probe.probing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'studio' has no attribute '{name}'")
    value = getattr(import_module(_HOMES.get(name, "studio.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
