"""Merge: one set of weights at every step, the adapters' sum or what a merging algorithm makes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step
from studio.registry import COMPOSERS
from studio.specs import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor

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
class Merge(Composer):
    """Add the adapters: ``W = W0 + sum_i w_i delta_i``, in the denoiser and in the text encoders.

    Free at run time for any number of adapters; more than two or three get in each other's way.
    LoRA Merge of Multi-LoRA Composition, arXiv:2402.16843, Sec. 2.

    With another ``how`` one adapter is formed of all before the first picture, the one that ``studio merge``
    would write, and drawn with at weight 1.
    """

    class Options(MergeOptions):
        """How the adapters become one."""

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> MergePlan:
        """Return the plan of a weighted sum, or of one adapter formed of all.

        Raises:
            AdapterError: If a change needs the base's weights, and ``base`` does not give them.
            UsageError: If nothing tells the rank to merge at.
        """
        if self.options.how == "linear" or not adapters:
            # Summed in the weights' own memory, exactly; nothing needs to be formed.
            return MergePlan(tuple(adapters), weights=dict(weights), text_weights=dict(weights))
        from studio.adapters.merge import merge_adapters

        name = f"{self.options.how} of {', '.join(adapters)}"
        merger, parameter = self.options.merger(), _reader(base.pipe if base else None)
        merged = merge_adapters(adapters, weights, merger, name=name, parameter=parameter)
        alone = {name: 1.0}
        return MergePlan((name,), weights=alone, text_weights=alone, formed={name: merged.adapter})


def _reader(pipe: Any) -> "Callable[[str], Tensor] | None":
    """Return what gives a pipeline's parameters by canonical name."""
    if pipe is None:
        return None
    from studio.adapters.parameters import components_of, find_parameter

    components = components_of(pipe)
    return lambda name: find_parameter(components, name).detach()
