"""Decor: prompts without the directions of words that are not wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.modified import ModifiedPlan
from studio.composition.plan import (
    BaseInfo,
    Branch,
    Modifier,
    Plan,
    Request,
    Step,
    Suppression,
    Text,
)
from studio.errors import CompositionError
from studio.registry import MODIFIERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

_OWN = "decor"


@dataclass(frozen=True)
class DecorPlan(ModifiedPlan):
    """The inner plan whose branches all have prompt embeddings of the plan's texts."""

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the inner plan's branches; those with the pipeline's own prompt embeddings have others."""
        return tuple(
            branch if branch.text is not None else replace(branch, text=_OWN)
            for branch in self.inner.at(step)
        )


@MODIFIERS.register("decor")
class Decor(Modifier):
    """Take what words mean out of the prompt's embeddings, so that an adapter does not draw it along.

    Against a style adapter that brings the things of its training pictures: name those. No weights, one more
    encoding of the prompt. DECOR, arXiv:2412.09169. Differs from the paper: rows keep their length, unless
    ``keep_length`` is off.
    """

    class Options(MethodOptions):
        """Options of the projection."""

        words: str = Field(min_length=1, description="What is not wanted, such as 'house, tree'.")
        strength: float = Field(1.0, ge=0, le=1, description="How much of it is taken out; 0 for nothing.")
        rank: int = Field(8, ge=1, description="How many directions of the words are taken out.")
        keep_length: bool = Field(True, description="Give each row of the embeddings its length back.")

    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan with other prompts.

        Raises:
            CompositionError: If the prompts are projected already.
        """
        if _OWN in plan.texts:
            raise CompositionError("decor can be used once. Put all words into one.")
        without = Suppression(
            self.options.words, self.options.strength, self.options.rank, self.options.keep_length
        )
        texts = {name: replace(text, without=without) for name, text in plan.texts.items()}
        return DecorPlan.around(plan, texts={**texts, _OWN: Text(plan.text_weights, without=without)})
