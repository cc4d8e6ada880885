"""What a user may ask for: one definition feeds TOML, flags, help text and the page's form."""

from studio.specs.base import MethodSpec, Options, allows_none, known_fields, parse_spec, settable
from studio.specs.composition import AdapterUse, CompositionSpec, adapter_names
from studio.specs.events import Event, OnEvent
from studio.specs.generate import GenerateSpec
from studio.specs.merge import MergeOptions, MergeSpec
from studio.specs.probe import ProbeSpec
from studio.specs.train import TrainSpec

__all__ = [
    "AdapterUse",
    "CompositionSpec",
    "Event",
    "GenerateSpec",
    "MergeOptions",
    "MergeSpec",
    "MethodSpec",
    "OnEvent",
    "Options",
    "ProbeSpec",
    "TrainSpec",
    "adapter_names",
    "allows_none",
    "known_fields",
    "parse_spec",
    "settable",
]
