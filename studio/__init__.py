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
    from studio.data.captioner import caption_folder
    from studio.errors import StudioError
    from studio.probing import probe
    from studio.specs import GenerateSpec, ProbeSpec, TrainSpec

__version__ = "0.1.0"

__all__ = [
    "GenerateSpec",
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
    "probe",
    "save_adapter",
    "train",
]

_HOMES = {
    "GenerateSpec": "studio.specs",
    "ProbeSpec": "studio.specs",
    "StudioError": "studio.errors",
    "TrainSpec": "studio.specs",
    "caption_folder": "studio.data.captioner",
    "probe": "studio.probing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'studio' has no attribute '{name}'")
    value = getattr(import_module(_HOMES.get(name, "studio.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
