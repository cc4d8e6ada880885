"""Negative: adapters that act on what is steered away from, and nowhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import BaseInfo, Branch, Modifier, Plan, Request, Step, Text
from studio.composition.policies import known
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class NegativePlan(ModifiedPlan):
    """The inner plan with further adapters where its branches answer for the unconditional rows.

    Attributes:
        negative: Weight by adapter.
        negative_texts: Prompt embeddings of those rows, by the embeddings of the inner plan's branches; empty
            where these adapters leave the text encoders as they are.
    """

    negative: Mapping[str, float]
    negative_texts: Mapping[str | None, str]

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches, those for all rows in two."""
        found: list[Branch] = []
        for branch in self.inner.at(step):
            if branch.answers_for("conditional"):
                found.append(replace(branch, rows="conditional"))
            if branch.answers_for("unconditional"):
                weights = {**branch.weights, **self.negative}
                text = self.negative_texts.get(branch.text, branch.text)
                # Features of the other rows, as many, must not be taken for these.
                slot = None if branch.slot is None else (branch.slot, "unconditional")
                found.append(replace(branch, rows="unconditional", weights=weights, text=text, slot=slot))
        return tuple(found)


@MODIFIERS.register("negative")
class Negative(Modifier):
    """Let adapters act on the unconditional rows alone: guidance steers away from what they draw.

    For adapters of what is not wanted, such as one of bad anatomy. What the prompt asks for is answered
    without them, so they cannot disturb it. The method does not see them; without guidance they do nothing.
    Costs no more rows, but two evaluations where there was one, unless they stand in one batch. Of adapters
    with a text-encoder part the negative prompt is encoded with it, one more encoding.
    """

    class Options(MethodOptions):
        """Options of negative adapters."""

        adapters: tuple[str, ...] = Field(min_length=1, description="Names of the adapters.")

    def takes(self, adapters: Sequence[str]) -> Sequence[str]:
        """Return the negative adapters.

        Raises:
            CompositionError: If one is not there.
        """
        return known("negative", self.options.adapters, adapters)

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with the negative adapters."""
        from studio.composition.executor import of_encoders

        negative = {name: weights[name] for name in self.takes(list(adapters))}
        said: dict[str | None, str] = {}
        texts: dict[str, Text] = {}
        if any(of_encoders(parameter) for name in negative for parameter in adapters[name].changes):
            own = [(name, text.weights) for name, text in plan.texts.items()]
            for name, text_weights in [(None, plan.text_weights), *own]:
                said[name] = "negative" if name is None else f"negative of {name}"
                # What a branch says instead of the prompt does not change the negative one.
                texts[said[name]] = Text({**text_weights, **negative})
        return NegativePlan.around(
            plan, negative=negative, negative_texts=said, texts={**plan.texts, **texts}
        )
