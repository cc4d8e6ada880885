"""From a method, modifiers and adapters to a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.adapters.adapter import Adapter
from studio.composition.plan import BaseInfo, Composer, Modifier, Plan, Request
from studio.composition.shaped import Curve
from studio.errors import CompositionError, UsageError
from studio.registry import COMPOSERS, MODIFIERS
from studio.specs import Options as MethodOptions
from studio.specs import parse_spec


@dataclass(frozen=True)
class Planner:
    """Prepares the plan, once, or for each prompt where it depends on it."""

    composer: Composer
    modifiers: Sequence[Modifier]
    adapters: Mapping[str, Adapter]
    weights: Mapping[str, float]
    base: BaseInfo | None

    @property
    def reads_prompt(self) -> bool:
        """Whether the plan depends on the prompt."""
        return self.composer.reads_prompt or any(modifier.reads_prompt for modifier in self.modifiers)

    def plan(self, request: Request | None = None) -> Plan:
        """Return the plan of the method as the modifiers change it."""
        names = list(self.adapters)
        taken: set[str] = set()
        for modifier in self.modifiers:
            own = set(modifier.takes(names))
            if twice := sorted(own & taken):
                raise CompositionError(
                    f"'{twice[0]}' is given to two modifiers, which each say how it acts instead of the "
                    "method. Leave it to one of them."
                )
            taken |= own
        shown = {name: adapter for name, adapter in self.adapters.items() if name not in taken}
        weights = {name: self.weights[name] for name in shown}
        factors: dict[str, Mapping[str, Curve]] = {}
        for modifier in self.modifiers:
            factors |= modifier.factors(shown, self.base)
        plan = self.composer.weighed(factors).prepare(shown, weights, self.base, request)
        for modifier in self.modifiers:
            plan = modifier.modify(plan, self.adapters, self.weights, self.base, request)
        return plan


def make_composer(method: str | Composer, options: Mapping[str, Any] | MethodOptions | None) -> Composer:
    """Return a composition method by name, or the one given.

    Raises:
        UsageError: If the method or one of its options does not exist.
        CompositionError: If options are given beside a composer that has its own.
    """
    if isinstance(method, str):
        composer: Composer = _made(COMPOSERS[method], options)
        return composer
    if options is not None:
        raise CompositionError(
            "options were given beside a composer that has its own. Put them into the composer."
        )
    return method


def make_modifiers(given: Mapping[str, Mapping[str, Any] | MethodOptions]) -> list[Modifier]:
    """Return plan modifiers by name with their options, those that have the last word at the end.

    Raises:
        UsageError: If a modifier or one of its options does not exist.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"modifiers: give options by name, such as {{'cache': {{}}}}, got {given!r}.")
    made = [_made(MODIFIERS[name], options) for name, options in given.items()]
    return sorted(made, key=lambda modifier: modifier.outermost)


def _made(kind: Any, options: Mapping[str, Any] | MethodOptions | None) -> Any:
    if not isinstance(options, kind.Options):
        if not isinstance(options or {}, Mapping):
            raise UsageError(f"options of a method or modifier are given by name, got {options!r}.")
        options = parse_spec(kind.Options, dict(options or {}))
    return kind(options)
