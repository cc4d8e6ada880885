"""Composite: every adapter answers alone, and the step goes by the mean of their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step, Text
from studio.composition.policies import TextPolicy, check_some, known, say_if_alone, text_weights
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class CompositePlan(Plan):
    """The same branches at every step."""

    branches: tuple[Branch, ...]

    constant = True

    def at(self, step: Step) -> Sequence[Branch]:
        """Return a branch for each adapter."""
        return self.branches


@COMPOSERS.register("composite")
class Composite(Composer):
    """Evaluate the denoiser once for each adapter and average: ``e = sum_i s_i e_i / sum_i s_i``.

    Keeps adapters apart that a merge would mix, at the cost of one evaluation for each of them in every step.
    LoRA Composite of Multi-LoRA Composition, arXiv:2402.16843, Sec. 3.2, Eq. 5; guidance is linear, so the
    mean of guided answers is the guided mean. Without guidance it is the mean of the plain answers, where the
    authors' code takes the last adapter's.
    """

    class Options(MethodOptions):
        """Options of Composite."""

        shares: dict[str, float] = Field(
            default_factory=dict,
            description="What each adapter's answer counts for, by name; 1 where not given.",
        )
        shared_unconditional: bool = Field(
            False,
            description="Let the base alone answer for the unconditional rows: N + 1 half evaluations a step "
            "instead of 2 N. Differs from the paper.",
        )
        text_encoder_policy: TextPolicy = "merged"

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> CompositePlan:
        """Return the plan.

        Raises:
            CompositionError: If there is no adapter, or shares name none, are negative or sum to 0.
        """
        shares = _shares(self.options.shares, list(adapters))
        if not self.options.shared_unconditional:
            say_if_alone(adapters)
        own = self.options.text_encoder_policy == "own"
        rows: Literal["all", "conditional"] = "conditional" if self.options.shared_unconditional else "all"
        branches = [
            Branch({name: weights[name]}, rows, share, text=name if own else None)
            for name, share in shares.items()
        ]
        if self.options.shared_unconditional:
            branches.append(Branch({}, "unconditional"))
        return CompositePlan(
            tuple(adapters),
            branches=tuple(branches),
            text_weights=text_weights(self.options.text_encoder_policy, weights),
            texts={name: Text({name: weights[name]}) for name in adapters} if own else {},
        )


def _shares(given: Mapping[str, float], adapters: Sequence[str]) -> dict[str, float]:
    """Return each adapter's share; they sum to 1."""
    check_some("composite", adapters)
    known("shares", list(given), adapters)
    shares = {name: given.get(name, 1.0) for name in adapters}
    total = sum(shares.values())
    if min(shares.values()) < 0 or not total > 0:
        raise CompositionError(
            f"shares must be positive or 0, and not all 0, got {', '.join(map(str, shares.values()))}."
        )
    return {name: share / total for name, share in shares.items()}
