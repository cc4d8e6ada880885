"""What a user may ask for: one definition feeds TOML, flags, help text and the page's form."""

from studio.specs.base import MethodSpec, Options, allows_none, known_fields, parse_spec, settable
from studio.specs.batch import BatchSpec
from studio.specs.composition import AdapterUse, CompositionSpec, adapter_names
from studio.specs.events import Event, OnEvent
from studio.specs.generate import GenerateSpec
from studio.specs.grid import GridSpec
from studio.specs.merge import MergeOptions, MergeSpec
from studio.specs.probe import ProbeSpec
from studio.specs.train import TrainSpec
from studio.specs.zip import ZipSpec

__all__ = [
    "AdapterUse",
    "BatchSpec",
    "CompositionSpec",
    "Event",
    "GenerateSpec",
    "GridSpec",
    "MergeOptions",
    "MergeSpec",
    "MethodSpec",
    "OnEvent",
    "Options",
    "ProbeSpec",
    "TrainSpec",
    "ZipSpec",
    "adapter_names",
    "allows_none",
    "known_fields",
    "parse_spec",
    "settable",
]
