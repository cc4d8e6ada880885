"""Weights that differ from block to block and from step to step, under any composition method.

A curve says how an adapter's weight goes along the run: a number, or points ``(place, weight)`` with straight
lines between them. A place is a fraction of the full schedule, ``Step.fraction``; before the first point and
after the last one the weight stays, and two points at one place make a jump.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import Branch, LayerWeights, Step

Curve = float | tuple[tuple[float, float], ...]
"""One weight, or points (place, weight) in ascending order of place."""
Shape = Curve | Mapping[str, Curve]
"""What an adapter's weight is multiplied by: a curve, or one for each parameter that it changes."""


def read_curve(given: Any) -> Curve:
    """Return a curve from a number, points ``[[0, 0], [0.3, 1]]``, or text ``"0@0, 1@0.3"`` (weight@place).

    Raises:
        ValueError: If it is none; the text says why.
    """
    points = _points(given)
    for place, weight in points:
        if not 0 <= place <= 1 or not math.isfinite(weight):
            raise ValueError("places of a curve lie between 0 and 1, and its weights are finite numbers")
    if any(later[0] < sooner[0] for sooner, later in pairwise(points)):
        raise ValueError("the points of a curve come in ascending order of their places")
    return points[0][1] if len({weight for _, weight in points}) == 1 else points


def curve_text(curve: Curve) -> str | float:
    """Return a curve as the number or the text that :func:`read_curve` reads it from.

    Example:
        >>> curve_text(((0.0, 0.0), (0.3, 1.0)))
        '0@0 1@0.3'
    """
    if not isinstance(curve, tuple):
        return curve
    return " ".join(f"{_plain(weight)}@{_plain(place)}" for place, weight in curve)


def value_at(curve: Curve, fraction: float) -> float:
    """Return a curve's weight at a place of the run."""
    if not isinstance(curve, tuple):
        return curve
    passed = [point for point in curve if point[0] <= fraction]
    ahead = [point for point in curve if point[0] > fraction]
    if not passed or not ahead:
        return passed[-1][1] if passed else ahead[0][1]
    (start, low), (end, high) = passed[-1], ahead[0]
    return low + (high - low) * (fraction - start) / (end - start)


@dataclass(frozen=True)
class ShapedPlan(ModifiedPlan):
    """The inner plan with weights of the denoiser that are multiplied by shapes.

    Attributes:
        shapes: By adapter.
    """

    shapes: Mapping[str, Shape]

    @property
    def constant(self) -> bool:  # type: ignore[override]
        """True when neither the inner plan nor a shape depends on the step."""
        curves: list[Any] = []
        for shape in self.shapes.values():
            curves += shape.values() if isinstance(shape, Mapping) else [shape]
        return self.inner.constant and not any(isinstance(curve, tuple) for curve in curves)

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches with the step's weights."""
        return tuple(
            replace(
                branch, weights={name: self._shaped(branch, name, step.fraction) for name in branch.weights}
            )
            for branch in self.inner.at(step)
        )

    def _shaped(self, branch: Branch, name: str, fraction: float) -> float | LayerWeights:
        given, shape = branch.weights[name], self.shapes.get(name, 1.0)
        if isinstance(shape, Mapping):
            return {
                parameter: branch.weight(name, parameter) * value_at(curve, fraction)
                for parameter, curve in shape.items()
            }
        factor = value_at(shape, fraction)
        if isinstance(given, Mapping):
            return {layer: weight * factor for layer, weight in given.items()}
        return given * factor


def _points(given: Any) -> tuple[tuple[float, float], ...]:
    if isinstance(given, str):
        words = re.split(r"[,\s]+", given.strip())
        if len(words) == 1 and "@" not in words[0]:
            return ((0.0, _number(words[0])),)
        pairs = [word.split("@")[::-1] for word in words]
    elif isinstance(given, (list, tuple)):
        pairs = [list(point) if isinstance(point, (list, tuple)) else [point] for point in given]
    else:
        return ((0.0, _number(given)),)
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "a curve is a number, points [[place, weight], ...], or text such as '0@0, 1@0.3' (weight@place)"
        )
    return tuple((_number(place), _number(weight)) for place, weight in pairs)


def _plain(number: float) -> str:
    return repr(number).removesuffix(".0")


def _number(given: Any) -> float:
    try:
        if isinstance(given, bool):
            raise TypeError
        return float(given)
    except (TypeError, ValueError):
        raise ValueError(f"'{given}' is no number") from None
