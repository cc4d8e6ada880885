"""K-LoRA: in each layer one adapter at a time, the content's early and the style's late."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from studio.composition.plan import BaseInfo, Branch, Composer, Plan, Request, Step
from studio.composition.policies import check_some, known, text_weights
from studio.errors import CompositionError
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter
    from studio.composition.layer_sums import LayerSums

_BETA = {"s": 0.5, "s*": 1.3}
# An entry this many times the mean is an outlier of the mode "layers".
_OUTLIER = 3.0


@dataclass(frozen=True)
class Layer:
    """What decides which adapter acts on a layer.

    Attributes:
        name: Of the module, canonical.
        content: Acts while ``S(u) <= ratio``.
        style: Acts otherwise.
        ratio: ``S_c / (gamma * S_s)``; infinite where nothing is to be decided.
    """

    name: str
    content: str
    style: str
    ratio: float = math.inf


@dataclass(frozen=True)
class KLoraPlan(Plan):
    """Per layer the content's adapter or a style's, by where the run is.

    Attributes:
        weights: Of the adapters that act.
        changed: The layers that each of them changes.
        layers: What decides in each layer.
        alpha: Slope of ``S(u) = alpha * u + beta``.
        beta: ``S(0)``, before wrapping.
        wraps: Whether S is taken modulo alpha: the paper's ``S*``.
    """

    weights: Mapping[str, float]
    changed: Mapping[str, Sequence[str]]
    layers: tuple[Layer, ...]
    alpha: float
    beta: float
    wraps: bool = False

    def scale(self, fraction: float) -> float:
        """Return the factor of the style's score at a place of the run, arXiv:2502.18461, Eq. 7."""
        scale = self.alpha * fraction + self.beta
        return scale % self.alpha if self.wraps else scale

    def at(self, step: Step) -> Sequence[Branch]:
        """Return the one branch, the same object for steps of the same selection."""
        # Layers leave the content in the order of their ratios, so how many it has tells which they are.
        contents = bisect_right(self._descending, -self.scale(step.fraction))
        if contents not in self._branches:
            self._branches[contents] = self._branch(contents)
        return (self._branches[contents],)

    def without_effect(self, run: Sequence[Step]) -> Iterator[str]:
        """Yield a sentence on each adapter that acts on none of the layers that it changes in a run."""
        branches = {id(branch): branch for step in run for branch in self.at(step)}.values()
        for name, changed in self.changed.items():
            if changed and not any(branch.mean_weight(name) for branch in branches):
                yield (
                    f"klora: '{name}' acts on no layer: in each that it changes, another counts for more at "
                    "every step. Choose other alpha and beta, set gamma to 'one' and raise its weight, or "
                    "leave it out."
                )

    @property
    def switching_points(self) -> dict[str, tuple[tuple[float, str], ...]]:
        """For each layer the fractions of the run from which on an adapter acts there, with its name.

        The first is 0; with ``S`` a layer has at most two entries, with ``S*`` three. At the very point
        itself the content still acts.
        """
        start = self.beta % self.alpha if self.wraps else self.beta
        pieces = [(0.0, start)]
        if self.wraps and start > 0:
            pieces.append((1 - start / self.alpha, 0.0))
        ends = [*(begin for begin, _ in pieces[1:]), 1.0]
        points = {}
        for layer in self.layers:
            turns: list[tuple[float, str]] = []
            for (begin, low), end in zip(pieces, ends, strict=True):
                turns.append((begin, layer.content if low <= layer.ratio else layer.style))
                crossing = begin + (layer.ratio - low) / self.alpha
                if begin <= crossing < end:
                    turns.append((crossing, layer.style))
            points[layer.name] = tuple(
                turn for place, turn in enumerate(turns) if not place or turn[1] != turns[place - 1][1]
            )
        return points

    @cached_property
    def _ranked(self) -> list[Layer]:
        return sorted(self.layers, key=lambda layer: -layer.ratio)

    @cached_property
    def _descending(self) -> list[float]:
        return [-layer.ratio for layer in self._ranked]

    @cached_property
    def _branches(self) -> dict[int, Branch]:
        return {}

    def _branch(self, contents: int) -> Branch:
        """Return the branch in which the content has that many of the layers."""
        acting = {layer.name: layer.content for layer in self._ranked[:contents]}
        acting |= {layer.name: layer.style for layer in self._ranked[contents:]}
        # Layers in which an adapter rests are named with weight 0, so that its mean weight tells its share.
        return Branch(
            {
                name: {layer: weight if acting[layer] == name else 0.0 for layer in self.changed[name]}
                for name, weight in self.weights.items()
            }
        )


@COMPOSERS.register("klora")
class KLora(Composer):
    """Let one adapter act on each layer: the content's at first, the style's from some step on.

    In a layer that both change the content acts while ``S_c >= gamma * S(u) * S_s``, with S_c and S_s the
    sums of the K largest absolute entries of the two changes, ``K = r_c * r_s``, ``S(u) = alpha * u + beta``
    and gamma the ratio of the sums of all absolute entries. As only S changes along a run, each layer has a
    switching point that is known before the first step; a step costs what the base's does.
    K-LoRA, arXiv:2502.18461, Eq. 7 for S; the paper's Algorithm 1 prints alpha and beta the other way round.

    u is the step's place in the full schedule, ``Step.fraction``: it is the same for all layers of a step
    and for any number of steps, and image-to-image starts inside the schedule. The authors' code counts calls
    of layers instead, so that there u grows by one step's worth from a step's first layer to its last.

    Beyond the paper: the changes are effective ones, with ``alpha / rank`` and the adapter's weight; layers
    may be of any kind, and a layer that only one adapter changes is that adapter's. With more adapters the
    first is the content; in each layer it meets every style as above, with the pair's own K and gamma, and
    where it loses, the style acts by which it loses most. Layers that the content does not change go to the
    style with the largest ``gamma * S``, measured against the first of them, at all steps. gamma balances
    what two adapters do in the layers that both change; it cancels their weights, which count in the decision
    with ``gamma="one"`` only.
    """

    class Options(MethodOptions):
        """Options of K-LoRA."""

        content: str | None = Field(None, description="Adapter of the content; default: the first.")
        schedule: Literal["s", "s*"] = Field(
            "s",
            description="s: style grows along the run; s*: the same modulo alpha, so that style also acts at "
            "the very start.",
        )
        alpha: float = Field(1.5, gt=0, le=100, description="How much the style's factor grows along a run.")
        beta: float | None = Field(
            None,
            ge=0,
            le=100,
            description="The style's factor at the start; default: 0.5 for s, 1.3 for s*.",
        )
        gamma: Literal["global", "layers", "one"] = Field(
            "global",
            description="How the adapters' sizes are balanced: by the ratio of their sums over all layers "
            "(the paper), by the mean of the layers' ratios without outliers (the authors' code), or not "
            "at all.",
        )
        k: int | None = Field(
            None,
            ge=1,
            description="Largest entries of a change that count; default: the product of the two ranks.",
        )
        text_encoder_policy: Literal["base", "first", "merged"] = Field(
            "merged",
            description="What the text encoders, which run once, hold: no adapter, the content, or all.",
        )

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> KLoraPlan:
        """Return the plan; measures adapters that meet and were not measured before.

        An adapter with weight 0 takes no part.

        Raises:
            CompositionError: If there are no two adapters, ``content`` names none, a rank is wanted of a
                change that has none, or a change cannot be measured without the base.
        """
        from studio.composition.layer_sums import layers_of

        order = self._order(list(adapters))
        acting = {name: weights[name] for name in order if weights[name]}
        changed = {name: layers_of(adapters[name]) for name in acting}
        meeting: dict[str, list[str]] = {}
        for name, layers in changed.items():
            for layer in layers:
                meeting.setdefault(layer, []).append(name)
        counts = {
            (layer, rival): self.options.k
            or _rank(adapters[names[0]], changed[names[0]][layer])
            * _rank(adapters[rival], changed[rival][layer])
            for layer, names in meeting.items()
            for rival in names[1:]
        }
        sums = _sums(adapters, acting, meeting, counts, base)
        duels = self._duels(meeting, counts, sums)
        options = self.options
        return KLoraPlan(
            tuple(adapters),
            weights=acting,
            changed={name: tuple(layers) for name, layers in changed.items()},
            layers=tuple(
                _decided(layer, names, duels.get(layer, {}), content=order[0])
                for layer, names in meeting.items()
            ),
            alpha=options.alpha,
            beta=_BETA[options.schedule] if options.beta is None else options.beta,
            wraps=options.schedule == "s*",
            text_weights=text_weights(options.text_encoder_policy, {name: weights[name] for name in order}),
        )

    def _order(self, names: Sequence[str]) -> list[str]:
        """Return the adapters, the content first."""
        check_some("klora", names)
        content = self.options.content or names[0]
        known("content", [content], names)
        if len(names) == 1:
            raise CompositionError(
                f"method 'klora' chooses between a content and a style in each layer, got '{content}' alone. "
                "Give two adapters or more, or use method 'merge'; pinned and negative ones do not count."
            )
        return [content, *(name for name in names if name != content)]

    def _duels(
        self,
        meeting: Mapping[str, Sequence[str]],
        counts: Mapping[tuple[str, str], int],
        sums: "Mapping[str, Mapping[str, LayerSums]]",
    ) -> dict[str, dict[str, float]]:
        """Return by layer the ratio of its first adapter to each other one."""
        shared: dict[tuple[str, str], list[str]] = {}
        for layer, rival in counts:
            shared.setdefault((meeting[layer][0], rival), []).append(layer)
        duels: dict[str, dict[str, float]] = {}
        for (first, rival), layers in shared.items():
            gamma = self._gamma([(sums[first][layer], sums[rival][layer]) for layer in layers])
            for layer in layers:
                count = counts[layer, rival]
                other = gamma * sums[rival][layer].largest[count]
                ratio = sums[first][layer].largest[count] / other if other > 0 else math.inf
                duels.setdefault(layer, {})[rival] = ratio
        return duels

    def _gamma(self, pairs: "Sequence[tuple[LayerSums, LayerSums]]") -> float:
        """Return what the second adapter's sums are multiplied by; 1 where one of the two does nothing."""
        mode = self.options.gamma
        ones, others = (sum(pair[place].total for pair in pairs) for place in (0, 1))
        if mode == "one" or not ones or not others:
            return 1.0
        if mode == "global":
            return ones / others
        ratios = [one.total / other.total for one, other in pairs if other.total]
        limit = _OUTLIER * sum(ratios) / len(ratios)
        kept = [ratio for ratio in ratios if ratio < limit]
        return sum(kept) / len(kept) or 1.0


def _sums(
    adapters: "Mapping[str, Adapter]",
    weights: Mapping[str, float],
    meeting: Mapping[str, Sequence[str]],
    counts: Mapping[tuple[str, str], int],
    base: BaseInfo | None,
) -> "dict[str, dict[str, LayerSums]]":
    """Return each adapter's sums in the layers where it meets another one.

    Args:
        adapters: By name.
        weights: Of those that act.
        meeting: The adapters that change a layer.
        counts: K by layer and by each adapter but the layer's first one, which it meets.
        base: What changes without low rank are measured on.
    """
    from studio.composition.layer_sums import layer_sums

    wanted: dict[str, dict[str, set[int]]] = {}
    for (layer, rival), count in counts.items():
        for name in (meeting[layer][0], rival):
            wanted.setdefault(name, {}).setdefault(layer, set()).add(count)
    base = base or BaseInfo()
    return {
        name: layer_sums(adapters[name], layers, weight=weights[name], pipe=base.pipe, base=base.fingerprint)
        for name, layers in wanted.items()
    }


def _decided(layer: str, names: Sequence[str], duels: Mapping[str, float], *, content: str) -> Layer:
    """Return what decides in a layer that these adapters change."""
    first = names[0]
    if not duels:
        return Layer(layer, first, first)
    rival = min(duels, key=lambda name: duels[name])
    if first == content:
        return Layer(layer, first, rival, duels[rival])
    winner = first if duels[rival] >= 1 else rival
    return Layer(layer, winner, winner)


def _rank(adapter: "Adapter", parameters: Sequence[str]) -> int:
    """Return the rank of an adapter's change of a layer, whose changed parameters are given."""
    ranks = []
    for name in parameters:
        change = adapter.changes[name]
        # A bias or the scale of a norm is a matrix of one column.
        rank = 1 if len(change.shape) == 1 else getattr(change, "rank", None)
        if not rank:
            raise CompositionError(
                f"'{adapter.name}' ({adapter.kind}) changes '{name}' without a rank, and K-LoRA counts as "
                "many entries as the product of the two adapters' ranks. Set k, for example to 64."
            )
        ranks.append(int(rank))
    return max(ranks)
