"""From a composition to its plan, without a base where none is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from studio.adapters.adapter import Adapter
from studio.adapters.families import check_one_family
from studio.adapters.files import load_adapter
from studio.adapters.header import tensor_hash
from studio.adapters.parameters import canonical_names, components_of
from studio.composition.engine import compose
from studio.composition.fit import check_weights, fit_adapters
from studio.composition.plan import BaseInfo, Plan
from studio.composition.planner import Planner, make_composer, make_modifiers
from studio.models.prompt_encoding import reading_prompts
from studio.provenance import adapter_differences
from studio.specs import CompositionSpec, Event, OnEvent, adapter_names
from studio.specs.composition import Ingredients

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MEASURE = "Here --measure loads the base."
"""What to add where the base is needed and was not loaded."""


@dataclass(frozen=True)
class Planned:
    """A plan and what it is made of.

    Attributes:
        plan: The plan.
        adapters: All that its branches name, fitted to the base where there is one, and new tokens' ones.
        weights: Of the given adapters.
    """

    plan: Plan
    adapters: Mapping[str, Adapter]
    weights: Mapping[str, float]


def load_adapters(spec: Ingredients, pipe: "DiffusionPipeline | None" = None) -> dict[str, Adapter]:
    """Return a request's adapters by name.

    Raises:
        AdapterError: If one cannot be read or does not fit the base.
    """
    names = adapter_names(spec.adapters)
    return {
        name: load_adapter(use.path, base=pipe, name=name)
        for name, use in zip(names, spec.adapters, strict=True)
    }


def weights_of(spec: Ingredients) -> dict[str, float]:
    """Return a request's weights by adapter."""
    return dict(zip(adapter_names(spec.adapters), (use.weight for use in spec.adapters), strict=True))


def tell_differences(spec: Ingredients, tell: OnEvent) -> None:
    """Say which adapters are not those whose hashes are expected."""
    if spec.expected_hashes:
        hashes = [tensor_hash(use.path) for use in spec.adapters]
        for line in adapter_differences(spec, hashes):
            tell(Event(kind="message", message=line))


def plan_of(
    spec: CompositionSpec,
    pipe: "DiffusionPipeline | None" = None,
    *,
    prompt: str | None = None,
    fingerprint: str | None = None,
) -> Planned:
    """Return the plan of a composition.

    Args:
        spec: The composition.
        pipe: Its base; without one adapters are only checked to be of the same family of bases.
        prompt: For methods that depend on it; needs the base. Without one their plan is that of no prompt.
        fingerprint: Of the base, where there is no pipeline: what was measured on it before is found by this.
            Default: the one that the composition expects.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit, or a merge of them needs the base.
        BaseNeeded: If the method measures adapters on the base, and that was not done before.
        CompositionError: If the method cannot do it.
    """
    adapters, weights = load_adapters(spec, pipe), weights_of(spec)
    acting = {name: adapter for name, adapter in adapters.items() if adapter.changes or not adapter.tokens}
    if pipe is not None:
        plan = _plan_on(pipe, spec, adapters, weights, prompt)
        acting = fit_adapters(acting, canonical_names(components_of(pipe)))
    else:
        check_one_family(
            {
                name: {key: tuple(change.shape) for key, change in adapter.changes.items()}
                for name, adapter in adapters.items()
            }
        )
        given = {name: weight for name, weight in check_weights(adapters, weights).items() if name in acting}
        composer = make_composer(spec.method, spec.options)
        base = BaseInfo(fingerprint=fingerprint or spec.expected_hashes.get(spec.base))
        plan = Planner(composer, make_modifiers(spec.modifiers), acting, given, base).plan()
    tokens = {name: adapter for name, adapter in adapters.items() if name not in acting}
    return Planned(plan, {**acting, **plan.formed, **tokens}, weights)


def reads_prompt(spec: CompositionSpec) -> bool:
    """Return whether the plan of a composition depends on the prompt."""
    composer = make_composer(spec.method, spec.options)
    return composer.reads_prompt or any(each.reads_prompt for each in make_modifiers(spec.modifiers))


def _plan_on(
    pipe: Any,
    spec: CompositionSpec,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    prompt: str | None,
) -> Plan:
    composition = compose(
        pipe, adapters, method=spec.method, weights=weights, options=spec.options, modifiers=spec.modifiers
    )
    if prompt is not None:
        with reading_prompts(pipe), composition, torch.no_grad():
            pipe.encode_prompt(
                prompt=prompt,
                device=pipe.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
    return composition.plan
