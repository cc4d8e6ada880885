"""A plan: which adapters act at which step, on which layers, with which weight. Data: no model, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from studio.errors import UsageError
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from torch import Tensor

    from studio.adapters.adapter import Adapter
    from studio.composition.attention import View
    from studio.composition.shaped import Curve


@dataclass(frozen=True)
class Step:
    """One executed solver step of a run.

    Attributes:
        index: Steps executed before this one, from 0; the two denoiser calls of a Heun step share it.
        total: Solver steps that this run executes.
        fraction: Position in the full schedule in [0, 1); under image-to-image it does not start at 0.
    """

    index: int
    total: int
    fraction: float


LayerWeights = Mapping[str, float]
Rows = Literal["all", "conditional", "unconditional"]


@dataclass(frozen=True)
class Suppression:
    """Words whose directions are taken out of prompt embeddings, see ``composition/projection.py``.

    Attributes:
        words: What is not wanted.
        strength: From 0, nothing is taken out, to 1, all of it.
        rank: How many directions, the strongest first.
        keep_length: Give each row its length back.
    """

    words: str
    strength: float = 1.0
    rank: int = 8
    keep_length: bool = True


@dataclass(frozen=True)
class Text:
    """What the prompt embeddings of a branch are made from.

    Attributes:
        weights: Weights of the adapters' text-encoder parts. Absent means 0.
        prompt: What to say instead of the prompt that the pipeline is given; None for the pipeline's own.
        without: What to take out of the conditional rows; None for nothing.
    """

    weights: Mapping[str, float]
    prompt: str | None = None
    without: Suppression | None = None


@dataclass(frozen=True)
class Branch:
    """One evaluation of the denoiser within a step.

    Rows that no branch of a step answers for take the answer of the conditional ones: so guidance is skipped.

    Attributes:
        weights: From adapter name to one weight, or to weights by layer. A layer is a dotted prefix of
            canonical parameter names (``unet.up_blocks.0``); the longest prefix counts, and what no prefix
            covers has weight 0.
        rows: Which rows of the guided batch the branch answers for.
        share: Factor of the branch's answer in the step's answer.
        text: Name of its prompt embeddings in ``Plan.texts``; None for those that the pipeline made.
        region: Name of a mask in ``Plan.regions`` that the share is multiplied by, pixel by pixel; None for
            the whole picture.
        slot: Under what the deep features are kept for later steps; None keeps none.
        reuse: The most steps that kept features of the slot may be old to be taken instead of computed; 0
            computes them anew.
    """

    weights: Mapping[str, float | LayerWeights]
    rows: Rows = "all"
    share: float = 1.0
    text: str | None = None
    region: str | None = None
    slot: Hashable = None
    reuse: int = 0

    @cached_property
    def weighting(self) -> Hashable:
        """What tells whether two branches want the same weights of the denoiser."""
        return tuple(
            (name, tuple(sorted(weight.items())) if isinstance(weight, Mapping) else weight)
            for name, weight in sorted(self.weights.items())
        )

    def answers_for(self, rows: Rows) -> bool:
        """Return whether the branch answers for the conditional or the unconditional rows."""
        return self.rows in ("all", rows)

    def weight(self, adapter: str, parameter: str) -> float:
        """Return the adapter's weight on the parameter of that canonical name; 0 where it does not act."""
        weight = self.weights.get(adapter, 0.0)
        if not isinstance(weight, Mapping):
            return weight
        return next((weight[layer] for layer in layers_over(parameter) if layer in weight), 0.0)

    def mean_weight(self, adapter: str) -> float:
        """Return the adapter's weight, for layered weights their mean: the figure of a table's cell."""
        weight = self.weights.get(adapter, 0.0)
        if not isinstance(weight, Mapping):
            return weight
        return sum(weight.values()) / len(weight) if weight else 0.0


@dataclass(frozen=True)
class Cut:
    """Where the shallow part of a UNet ends, whose deep part is reused.

    All of the levels outside of ``level`` is computed anew, of ``level`` itself the first ``layers`` layers
    (a residual block with its attention) on the way down and the last ``layers + 1`` on the way up.

    DeepCache, arXiv:2312.00858, Sec. 3.2, counts layers from 0: its branch 0 is one layer here.

    Attributes:
        level: Resolution level, 0 is the outermost.
        layers: Layers of it that are computed on the way down, at least 1.
    """

    level: int = 0
    layers: int = 1


def covers(layer: str, parameter: str) -> bool:
    """Return whether the dotted prefix ``layer`` holds the parameter."""
    return parameter == layer or parameter.startswith(f"{layer}.")


def layers_over(parameter: str) -> Iterator[str]:
    """Go through a parameter's name and its dotted prefixes, the longest first."""
    while parameter:
        yield parameter
        parameter = parameter.rpartition(".")[0]


@dataclass(frozen=True)
class PlanRow:
    """One row of a plan's table: an adapter's weight at each step.

    Mean of the layers, sum of the branches that answer for the conditional rows.
    """

    adapter: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Plan(ABC):
    """What a composer decides.

    Attributes:
        adapters: Names, in the order of the table's rows.
        text_weights: Weights of the adapters' text-encoder parts; they hold for the whole composition,
            because a prompt is encoded once, before the first step. Absent means 0.
        texts: Further prompt embeddings, by the names that branches give.
        regions: Masks ``[1, 1, H, W]`` of any size with values from 0 to 1, by the names that branches give.
        feather: Standard deviation, in pixels of the latents, of the Gaussian that softens regions' edges.
        formed: Adapters that the composer made of the given ones, by the names that branches give.
        cut: How deep a branch that reuses features still computes.
        watched: Cross-attention layers of one resolution, by their names in the UNet, whose maps the plan is
            shown. Its regions are then those that it finds in them.
        constant: True when ``at`` does not depend on the step.
    """

    adapters: tuple[str, ...]
    text_weights: Mapping[str, float] = field(kw_only=True)
    texts: Mapping[str, Text] = field(default_factory=dict, kw_only=True)
    regions: "Mapping[str, Tensor]" = field(default_factory=dict, kw_only=True)
    feather: float = field(default=0.0, kw_only=True)
    formed: "Mapping[str, Adapter]" = field(default_factory=dict, kw_only=True)
    cut: Cut = field(default=Cut(), kw_only=True)
    watched: tuple[str, ...] = field(default=(), kw_only=True)
    constant: ClassVar[bool] = False

    @abstractmethod
    def at(self, step: Step) -> Sequence[Branch]:
        """Return the step's branches.

        For the conditional rows, and for the unconditional ones if any branch answers for them, the shares
        sum to 1; where regions take part, at each pixel what they weigh is divided by its sum.
        """

    def restarts(self, step: Step) -> bool:
        """Return whether the solver is to combine nothing at a step that was answered before it."""
        return False

    def steered(self, view: "View") -> "Tensor | None":
        """Return the latents to go on with in place of ``view.latents``, or None for these.

        Asked before each step of plans that watch.
        """
        return None

    def found(self, maps: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Return the regions of an evaluation, for plans that watch.

        Args:
            maps: What the branches of regions attended to in it ``[B, tokens, h, w]``, by region.
        """
        return self.regions

    def check(self, total: int) -> None:  # noqa: B027 - most plans suit every number of steps
        """Raise CompositionError when a run of ``total`` steps cannot do what the plan is for."""

    def without_effect(self, run: Sequence[Step]) -> Iterator[str]:
        """Yield a sentence on each part of the plan that does nothing in a run of these steps."""
        return iter(())

    def describe(self, total: int) -> list[PlanRow]:
        """Return the table adapter x step of a full run of ``total`` steps.

        Example:
            >>> from studio.composition.methods.switch import Switch
            >>> composer = Switch(Switch.Options(switch_every=2))
            >>> plan = composer.prepare({"cat": None, "hat": None}, {"cat": 1.0, "hat": 0.8})
            >>> [row.weights for row in plan.describe(5)]
            [(1.0, 1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.8, 0.8, 0.0)]
        """
        steps = [self.at(Step(index, total, index / total)) for index in range(total)]
        return [
            PlanRow(name, tuple(_conditional_weight(name, branches) for branches in steps))
            for name in self.adapters
        ]


def _conditional_weight(adapter: str, branches: Sequence[Branch]) -> float:
    acting = [branch for branch in branches if branch.answers_for("conditional")]
    return sum(branch.share * branch.mean_weight(adapter) for branch in acting)


@dataclass(frozen=True)
class BaseInfo:
    """What a composer may know of the base.

    Attributes:
        architecture: "sd1", "sd2" or "sdxl"; None where the base is not loaded.
        shapes: Shapes by canonical parameter name; none where the base is not loaded.
        pipe: The pipeline itself, for composers that measure adapters on it; None where a plan is only drawn.
        fingerprint: Of a base that is not loaded: what was measured on it before is found under this.
    """

    architecture: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pipe: Any = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Request:
    """What a composer may know of the pictures to come.

    Attributes:
        prompt: What the pipeline is asked for.
        negative_prompt: What it is to keep away from.
        embed: From a text to the base's own prompt embedding ``[tokens, width]`` of it, fp32, padding left
            out.
        others: The prompts of the batch after the first.
    """

    prompt: str
    negative_prompt: str = ""
    embed: "Callable[[str], Tensor] | None" = None
    others: tuple[str, ...] = ()


class Planning:
    """What takes part in making a plan, by options of its own.

    Attributes:
        Options: Its options.
        options: As they are set.
        reads_prompt: Whether the plan depends on the prompt. Then it is prepared without a request first and
            again for each call of the pipeline.

    Raises:
        UsageError: If the options are another's.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    reads_prompt: ClassVar[bool] = False

    def __init__(self, options: MethodOptions | None = None) -> None:
        if options is not None and not isinstance(options, self.Options):
            name = type(self).__name__
            raise UsageError(f"{name} takes {name}.Options(...), got {type(options).__name__}.")
        self.options: Any = self.Options() if options is None else options

    def check_prompt(self, prompt: str, adapters: Sequence[str]) -> None:
        """Raise CompositionError if a prompt's text lacks what the plan of these adapters looks for in it."""


class Composer(Planning, ABC):
    """A composition method: from adapters and weights a plan."""

    def weighed(self, factors: "Mapping[str, Mapping[str, Curve]]") -> "Composer":
        """Return the composer that multiplies adapters' weights by these, parameter by parameter.

        Only one that makes one adapter of several has to: other plans give weights to each, which modifiers
        change afterwards.
        """
        return self

    @abstractmethod
    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the plan for these adapters, whose names ``weights`` holds in the same order.

        Raises:
            CompositionError: If the options do not suit the adapters.
        """


class Modifier(Planning, ABC):
    """Changes what a composition method decided, whichever it is.

    Attributes:
        outermost: The higher, the later it has its word, whatever the order that modifiers are given in.
    """

    outermost: ClassVar[int] = 0

    def takes(self, adapters: Sequence[str]) -> Sequence[str]:
        """Return the adapters that are this modifier's own, which the method is not shown."""
        return ()

    def factors(
        self, adapters: "Mapping[str, Adapter]", base: BaseInfo | None = None
    ) -> "Mapping[str, Mapping[str, Curve]]":
        """Return by what it multiplies adapters' weights, by adapter and by each parameter that it changes.

        Raises:
            CompositionError: If the options do not suit the adapters.
        """
        return {}

    @abstractmethod
    def modify(
        self,
        plan: Plan,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> Plan:
        """Return the changed plan.

        Args:
            plan: Of the method, or of the modifier before this one.
            adapters: All, those included that the method was not shown.
            weights: Of all.
            base: As for ``Composer.prepare``.
            request: As for ``Composer.prepare``.

        Raises:
            CompositionError: If the options do not suit the plan or the adapters.
        """
