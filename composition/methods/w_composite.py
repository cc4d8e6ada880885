"""W-Composite: Composite with shares by how near each adapter's trigger words are to the prompt."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.importance import by_similarity, triggers_of
from studio.composition.methods.composite import Composite, CompositePlan
from studio.composition.plan import BaseInfo, Composer, Request
from studio.composition.policies import TextPolicy
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@COMPOSERS.register("w-composite")
class WComposite(Composer):
    """Composite whose shares are the similarity of trigger words and prompt.

    Costs as much as Composite, and N + 1 encodings before the first step.
    W-Composite, arXiv:2606.03792.
    """

    class Options(MethodOptions):
        """Options of W-Composite."""

        triggers: dict[str, str] = Field(
            default_factory=dict, description="Trigger words by adapter; default: what its file tells."
        )
        shared_unconditional: bool = Field(
            False, description="Let the base alone answer for the unconditional rows, as in Composite."
        )
        text_encoder_policy: TextPolicy = "merged"

    reads_prompt = True

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> CompositePlan:
        """Return the plan; while the prompt is not known, with equal shares.

        Raises:
            CompositionError: If there is no adapter, or trigger words are not known.
        """
        triggers = triggers_of(adapters, self.options.triggers)
        shares = {} if request is None else by_similarity(triggers, request)
        if not any(shares.values()):
            shares = {}
        composite = Composite.Options(
            shares=shares,
            shared_unconditional=self.options.shared_unconditional,
            text_encoder_policy=self.options.text_encoder_policy,
        )
        return Composite(composite).prepare(adapters, weights, base, request)
