"""A plan: which adapters act at which step, on which layers, with which weight. Data: no model, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from studio.specs import Options

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class Step:
    """One executed solver step of a run.

    Attributes:
        index: Steps executed before this one, from 0; the two denoiser calls of a Heun step share it.
        total: Solver steps that this run executes.
        fraction: Position in the full schedule in [0, 1); under image-to-image it does not start at 0.
        noise_level: Sigma in the variance-exploding convention, ``sqrt((1 - a) / a)``, a = alphas_cumprod.
        timestep: The number given to the denoiser; None in a table drawn without a scheduler.
    """

    index: int
    total: int
    fraction: float
    noise_level: float | None = None
    timestep: float | None = None


LayerWeights = Mapping[str, float]


@dataclass(frozen=True)
class Branch:
    """One evaluation of the denoiser within a step.

    Attributes:
        weights: From adapter name to one weight, or to weights by layer. A layer is a dotted prefix of
            canonical parameter names (``unet.up_blocks.0``); the longest prefix counts, and what no prefix
            covers has weight 0.
        rows: Which rows of the guided batch the branch answers for.
        share: Factor of the branch's answer in the step's answer.
    """

    weights: Mapping[str, float | LayerWeights]
    rows: Literal["all", "conditional", "unconditional"] = "all"
    share: float = 1.0

    def weight(self, adapter: str, parameter: str) -> float:
        """Return the adapter's weight on the parameter of that canonical name; 0 where it does not act."""
        weight = self.weights.get(adapter, 0.0)
        if not isinstance(weight, Mapping):
            return weight
        covering = [layer for layer in weight if covers(layer, parameter)]
        return weight[max(covering, key=len)] if covering else 0.0

    def mean_weight(self, adapter: str) -> float:
        """Return the adapter's weight, for layered weights their mean: the figure of a table's cell."""
        weight = self.weights.get(adapter, 0.0)
        if not isinstance(weight, Mapping):
            return weight
        return sum(weight.values()) / len(weight) if weight else 0.0


def covers(layer: str, parameter: str) -> bool:
    """Return whether the dotted prefix ``layer`` holds the parameter."""
    return parameter == layer or parameter.startswith(f"{layer}.")


@dataclass(frozen=True)
class PlanRow:
    """One row of a plan's table: an adapter's weight at each step, mean of layers, sum of branches."""

    adapter: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Plan(ABC):
    """What a composer decides.

    Attributes:
        adapters: Names, in the order of the table's rows.
        text_weights: Weights of the adapters' text-encoder parts; they hold for the whole composition,
            because a prompt is encoded once, before the first step. Absent means 0.
        constant: True when ``at`` does not depend on the step.
    """

    adapters: tuple[str, ...]
    text_weights: Mapping[str, float] = field(kw_only=True)
    constant: ClassVar[bool] = False

    @abstractmethod
    def at(self, step: Step) -> Sequence[Branch]:
        """Return the step's branches; their shares sum to 1."""

    def check(self, total: int) -> None:  # noqa: B027 - most plans suit every number of steps
        """Raise CompositionError when a run of ``total`` steps cannot do what the plan is for."""

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
            PlanRow(name, tuple(sum(part.share * part.mean_weight(name) for part in step) for step in steps))
            for name in self.adapters
        ]


@dataclass(frozen=True)
class BaseInfo:
    """What a composer may know of the base: architecture ("sd1") and shapes by canonical parameter name."""

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Request:
    """What a composer may know of the pictures to come; None where the caller has not said."""

    prompt: str | None = None
    negative_prompt: str | None = None


class Composer(Protocol):
    """A composition method: options, and from adapters and weights a plan."""

    Options: ClassVar[type[Options]]
    options: Any

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
        ...
