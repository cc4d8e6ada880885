"""Merge: one set of weights at every step, the adapters' sum or what a merging algorithm makes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import MergeOptions
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter
    from studio.composition.shaped import Curve


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

    def __init__(self, options: MethodOptions | None = None) -> None:
        super().__init__(options)
        self._factors: dict[str, Mapping[str, float]] = {}

    def weighed(self, factors: "Mapping[str, Mapping[str, Curve]]") -> "Merge":
        """Return a composer that merges adapters with these factors; a weighted sum leaves them to the plan.

        Raises:
            CompositionError: If one changes over the steps.
        """
        if self.options.how == "linear":
            return self
        composer = Merge(self.options)
        for name, curves in factors.items():
            composer._factors[name] = {
                parameter: curve for parameter, curve in curves.items() if not isinstance(curve, tuple)
            }
            if len(composer._factors[name]) < len(curves):
                raise CompositionError(
                    f"blocks: weights of '{name}' change over the steps, and '{self.options.how}' merges the "
                    "adapters once, before the first. Give numbers, or set how to linear."
                )
        return composer

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
        merged = merge_adapters(
            adapters, weights, merger, factors=self._factors, name=name, parameter=parameter
        )
        alone = {name: 1.0}
        return MergePlan((name,), weights=alone, text_weights=alone, formed={name: merged.adapter})


def _reader(pipe: Any) -> "Callable[[str], Tensor] | None":
    """Return what gives a pipeline's parameters by canonical name."""
    if pipe is None:
        return None
    from studio.adapters.parameters import components_of, find_parameter

    components = components_of(pipe)
    return lambda name: find_parameter(components, name).detach()
