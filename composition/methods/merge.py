"""Merge: every adapter acts at every step, changes weighted and summed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from studio.composition.plan import BaseInfo, Branch, Plan, Request, Step
from studio.registry import COMPOSERS
from studio.specs import Options

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class MergePlan(Plan):
    """The same weights at every step."""

    weights: Mapping[str, float]
    constant: ClassVar[bool] = True

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the one branch."""
        return (Branch(self.weights),)


@COMPOSERS.register("merge")
class Merge:
    """Add the adapters: ``W = W0 + sum_i w_i delta_i``, in the denoiser and in the text encoders.

    Free at run time for any number of adapters; more than two or three get in each other's way.
    LoRA Merge of Multi-LoRA Composition, arXiv:2402.16843, Sec. 2.
    """

    class Options(Options):
        """Merge has no options beyond the adapters' weights."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or self.Options()

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> MergePlan:
        """Return the plan of a weighted sum."""
        return MergePlan(tuple(adapters), weights=dict(weights), text_weights=dict(weights))
