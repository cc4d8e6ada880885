"""Sine: an adapter of one picture leads the start of a run, the base's own idea of the prompt the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from studio.composition.importance import triggers_of
from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step, Text
from studio.composition.policies import check_some
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

_SOURCE = "source"


@dataclass(frozen=True)
class SinePlan(Plan):
    """Base and adapters together until a place of the run, then the base alone."""

    together: tuple[Branch, ...]
    until: float

    def at(self, step: Step) -> Sequence[Branch]:
        """Return three branches, or one."""
        return self.together if step.fraction < self.until else (Branch({}),)


@COMPOSERS.register("sine")
class Sine(Composer):
    """Edit a picture that adapters were trained on: model-based guidance.

    ``e = s [v e_base(c) + (1 - v) e_adapters(c_source)] + (1 - s) e_base(0)`` while the noise is strong, then
    the base alone, with ``s`` the guidance scale, ``c`` the prompt and ``c_source`` what the adapters'
    pictures were called. Three half evaluations a step at first, two after.
    SINE: SINgle Image Editing, arXiv:2212.04489; v = 0.7 and the first 60 % of the steps (t > 400) as there.
    """

    class Options(MethodOptions):
        """Options of Sine."""

        source: str = Field(
            "",
            description="Prompt that the adapters' pictures were trained with; default: the trigger words "
            "that their files tell.",
        )
        base_share: float = Field(0.7, ge=0, le=1, description="What the base counts for at the start (v).")
        until: float = Field(0.6, ge=0, le=1, description="Where the adapters end, as a fraction of the run.")

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> SinePlan:
        """Return the plan.

        Raises:
            CompositionError: If there is no adapter, or the source prompt is not known.
        """
        check_some("sine", adapters)
        source = self.options.source or ", ".join(triggers_of(adapters, {}, option="source").values())
        share = self.options.base_share
        together = (
            Branch({}, "conditional", share),
            Branch(dict(weights), "conditional", 1 - share, text=_SOURCE),
            Branch({}, "unconditional"),
        )
        return SinePlan(
            tuple(adapters),
            together=together,
            until=self.options.until,
            text_weights={},
            texts={_SOURCE: Text(dict(weights), prompt=source)},
        )
