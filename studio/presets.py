"""Presets: settings of training for a task or a machine, as TOML files that come with the studio.

A preset is an ordinary config file that says what it is for in its first line. It names no data and no
output.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from studio.errors import UsageError
from studio.flags import read_toml
from studio.registry import nearest
from studio.specs import TrainSpec
from studio.specs.base import still_meant


def presets() -> dict[str, str]:
    """Return what each preset is for, by name."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in sorted(_folder().glob("*.toml"))
    }


def preset(*names: str) -> dict[str, Any]:
    """Return the values for ``TrainSpec`` of one or several presets; of those named twice the last count.

    Of presets for different methods the last one's method and options are taken, and of the others what all
    methods have.

    For example ``TrainSpec(**preset("8gb", "subject"), data="my_dog", output="dog.safetensors")``.

    Raises:
        UsageError: If there is no preset of a name; names the nearest and all others.
    """
    known = list(presets())
    values: dict[str, Any] = {}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown preset '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
        own = read_toml(_folder() / f"{name}.toml")
        if "method" in values and own.get("method", values["method"]) != values["method"]:
            values = {each: value for each, value in values.items() if each in TrainSpec.model_fields}
        values = still_meant(TrainSpec, values, own) | own
    return values


def _folder() -> Path:
    return Path(str(files("studio.assets") / "presets"))
