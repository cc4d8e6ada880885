"""What a user may ask for: one definition feeds TOML, flags, help text and the page's form."""

from studio.specs.base import MethodSpec, Options, allows_none, known_fields, parse_spec, settable
from studio.specs.events import Event, OnEvent
from studio.specs.generate import AdapterUse, GenerateSpec
from studio.specs.probe import ProbeSpec
from studio.specs.train import TrainSpec

__all__ = [
    "AdapterUse",
    "Event",
    "GenerateSpec",
    "MethodSpec",
    "OnEvent",
    "Options",
    "ProbeSpec",
    "TrainSpec",
    "allows_none",
    "known_fields",
    "parse_spec",
    "settable",
]
