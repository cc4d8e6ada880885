"""Values that the Train tab fills in: as it opens, for another base or method, and of presets."""

from collections.abc import Mapping
from typing import Any

from studio.presets import preset, presets
from studio.specs import TrainSpec, parse_spec, settable
from studio.ui.forms import Values

START: Values = {
    "prompt": "a photo of sks robot",
    "sample_every": 50,
    # For a retry after the worker was killed; on a stop and on most errors a checkpoint is written anyway.
    "checkpoint_every": 100,
}
DEMO_ON = {"base": "starter", "method": "lora"}
_NOWHERE = {"data": "pictures", "output": "adapter.safetensors"}


def method_of(request: Mapping[str, Any]) -> str:
    """Return the method that a request names or, by naming none, means."""
    return str(request.get("method", TrainSpec.model_fields["method"].default))


def is_demo(base: str, method: str) -> bool:
    """Say whether ``DEMO`` is made for these."""
    return {"base": base, "method": method} == DEMO_ON


def _values(request: Mapping[str, Any]) -> Values:
    """Return a request's values as they are meant, those of the method's options among them."""
    values: Values = parse_spec(TrainSpec, {**request, **_NOWHERE}).model_dump()
    values |= values.pop("options")
    return values


_ITS_OWN = preset("starter").keys() - {"method"}
DEMO: Values = {name: value for name, value in _values(preset("starter")).items() if name in _ITS_OWN}
"""More of what the page opens with, right for ``DEMO_ON`` alone."""
USUAL: Values = {name: settable(TrainSpec, DEMO_ON["method"])[name].default for name in DEMO}
"""What stands in their places for any other base or method; an empty rate is the method's own."""


def preset_values(names: list[str], base: str) -> Values:
    """Return values for all fields that any preset sets: those of these presets, else as on a new page.

    Raises:
        UsageError: If there is no preset of a name.
        SpecError: If the presets do not go together.
    """
    chosen = preset(*names)
    # One that names a method is for a task, and says all of it.
    demo = DEMO if "method" not in chosen and is_demo(base, method_of({})) else {}
    values = _values({**START, **demo, **chosen})
    touched = {name for each in presets() for name in preset(each)}
    return {name: value for name, value in values.items() if name in touched}
