"""Find out before drawing which pictures their compositions cannot draw, as far as that needs no base."""

from collections.abc import Sequence

from studio.bases import known_fingerprint
from studio.composing.document import composition_of
from studio.composing.planning import plan_of, reads_prompt
from studio.composition.plan import Plan
from studio.composition.planner import make_composer
from studio.errors import AdapterError, CompositionError, UsageError
from studio.specs import GenerateSpec, adapter_names


def planning_problems(specs: Sequence[GenerateSpec]) -> dict[int, str]:
    """Return by place what is wrong with specifications that cannot be drawn as they are composed.

    Where all have one composition and number of steps, only prompts are looked at: the first picture fails
    as soon as the plan is made.
    """
    keys = [(composition_of(spec).model_dump_json(), spec.steps) for spec in specs]
    plans: dict[str, Plan | str | None] = {}
    found: dict[int, str] = {}
    for place, (spec, (composition, _)) in enumerate(zip(specs, keys, strict=True)):
        if not spec.adapters and not spec.modifiers:
            continue
        if composition not in plans:
            plans[composition] = _plan(spec) if len(set(keys)) > 1 else None
        plan = plans[composition]
        if isinstance(plan, str):
            found[place] = plan
            continue
        try:
            names = adapter_names(spec.adapters)
            make_composer(spec.method, spec.options).check_prompt(spec.prompt, names)
            if plan is not None:
                plan.check(spec.steps)
        except CompositionError as error:
            found[place] = str(error)
    return found


def _plan(spec: GenerateSpec) -> Plan | str | None:
    """Return the plan of a composition, or what is wrong with it; None where only the base can tell."""
    try:
        known = known_fingerprint(spec.base, spec.device, spec.precision)
        plan = plan_of(spec, fingerprint=known).plan
    except AdapterError:
        # Not measured yet, or not read without a base; what is wrong with a file is found when it is drawn.
        return None
    except (CompositionError, UsageError) as error:
        return str(error)
    return None if reads_prompt(spec) else plan
