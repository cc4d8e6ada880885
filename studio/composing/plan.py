"""Show what a composition does at each step, as a table and as a picture."""

from studio.bases import cached_base, known_fingerprint
from studio.composing.picture import draw_timeline
from studio.composing.planning import MEASURE, Planned, plan_of, reads_prompt, tell_differences
from studio.composing.timeline import Timeline, timeline
from studio.composition.plan import Step
from studio.errors import BaseNeeded
from studio.inspection import refuse_existing
from studio.specs import Event, OnEvent
from studio.specs.composing import PlanSpec
from studio.whole_file import whole_file


def show_plan(spec: PlanSpec, *, on_event: OnEvent | None = None) -> Timeline:
    """Return a composition's plan along the steps, drawn as a picture too where one is asked for.

    Args:
        spec: The request.
        on_event: Told of what a person should know, and of the picture.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit.
        BaseNeeded: If the method measures adapters on the base, which was not done before, and it is not to
            be loaded.
        CompositionError: If the method cannot do it.
        OutputError: If the picture exists or cannot be written.
    """

    def tell(event: Event) -> None:
        if on_event:
            on_event(event)

    if spec.picture:
        refuse_existing(spec.picture, overwrite=spec.overwrite)
    tell_differences(spec, tell)
    plan = _planned(spec, tell).plan
    found = timeline(plan, spec.steps)
    if spec.prompt is None and reads_prompt(spec):
        message = "the plan depends on the prompt; this is the one without. Give --prompt."
        tell(Event(kind="message", message=message))
    run = [Step(index, spec.steps, index / spec.steps) for index in range(spec.steps)]
    for advice in plan.without_effect(run):
        tell(Event(kind="message", message=advice))
    if spec.picture:
        with whole_file(spec.picture) as unfinished:
            draw_timeline(found).save(unfinished, format="PNG", optimize=True)
        tell(Event(kind="picture", path=spec.picture))
    return found


def _planned(spec: PlanSpec, tell: OnEvent) -> Planned:
    """Return the plan, made without the base if it can be."""
    if spec.prompt is None or not reads_prompt(spec):
        try:
            known = known_fingerprint(spec.base, spec.device, spec.precision)
            return plan_of(spec, fingerprint=known)
        except BaseNeeded as error:
            if not spec.measure:
                raise BaseNeeded(f"{error} {MEASURE}") from None
    pipe = cached_base(spec.base, spec.device, spec.precision, on_event=tell)
    return plan_of(spec, pipe, prompt=spec.prompt)
