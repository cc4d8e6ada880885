"""What ``studio list`` shows: the names that options take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from studio.presets import presets
from studio.registry import COMPOSERS, FORMATS, KINDS, MERGERS, MODIFIERS, TRAINERS
from studio.specs import GenerateSpec


@dataclass(frozen=True)
class Table:
    """Names of one sort.

    Attributes:
        title: What they are and which option takes them.
        rows: What each one is, by name.
    """

    title: str
    rows: Mapping[str, str]


def tables() -> dict[str, Table]:
    """Return all tables by the word that asks for one of them."""
    schedulers = dict.fromkeys(get_args(GenerateSpec.model_fields["scheduler"].annotation), "")
    bases = {
        "starter": "The small model that comes with the studio.",
        "FOLDER": "A diffusers folder.",
        "FILE.safetensors": "A single-file checkpoint.",
        "OWNER/NAME": "A model of the Hugging Face hub; `studio doctor` names those already downloaded.",
    }
    return {
        "presets": Table("presets for training (studio train --preset)", presets()),
        "training": Table("training methods (studio train --method)", _described(TRAINERS)),
        "composition": Table("composition methods (studio generate --method)", _described(COMPOSERS)),
        "modifiers": Table("plan modifiers (studio generate --with)", _described(MODIFIERS)),
        "merging": Table("merging algorithms (studio merge --how)", _described(MERGERS)),
        "formats": Table(
            "adapter formats (studio train --format, studio convert --format)", _described(FORMATS)
        ),
        "kinds": Table("adapter kinds", _described(KINDS)),
        "schedulers": Table("schedulers (studio generate --scheduler)", schedulers),
        "bases": Table("base models (--base)", bases),
    }


def _described(registry: Any) -> dict[str, str]:
    lines = {name: (registry[name].__doc__ or "").strip().partition("\n")[0] for name in registry.names()}
    return {name: line.replace("``", "") for name, line in lines.items()}
