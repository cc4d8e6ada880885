"""CMLoRA: adapters take turns to lead, and only the one that leads is computed whole."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from studio.composition.plan import BaseInfo, Branch, Composer, Cut, Plan, Request, Step, Text
from studio.composition.policies import TextPolicy, check_some, known, text_weights
from studio.errors import BaseNeeded
from studio.registry import COMPOSERS
from studio.specs import Options as MethodOptions

if TYPE_CHECKING:
    from studio.adapters.adapter import Adapter

_CUTS = {"fast": Cut(0, 1), "quality": Cut(0, 2), "deep": Cut(1, 1)}


@dataclass(frozen=True)
class CmLoraPlan(Plan):
    """A branch and a slot for each adapter; at a refresh the slot of the adapter that leads is filled anew.

    Attributes:
        weights: In the order of the branches.
        early: Adapters that take turns to lead before the boundary.
        late: Adapters that do from there on.
        options: Of the method.
    """

    weights: Mapping[str, float]
    early: tuple[str, ...]
    late: tuple[str, ...]
    options: "CmLora.Options"

    def at(self, step: Step) -> Sequence[Branch]:
        """Return a branch for each adapter."""
        turn = bisect_right(self.refreshes(step.total), step.index) - 1
        leading = self.early if step.fraction < self.options.boundary else self.late
        leader = leading[turn % len(leading)]
        shares = self._shares(leader, turn)
        return tuple(
            Branch(
                {name: weight},
                share=shares[name],
                text=name if name in self.texts else None,
                # Nothing would ever reuse what is kept at every step.
                slot=None if self.options.interval == 1 else name,
                reuse=self._reuse(step, leads=name == leader),
            )
            for name, weight in self.weights.items()
        )

    def refreshes(self, total: int) -> tuple[int, ...]:
        """Return the steps of a run at which the turn goes on."""
        return _refreshes(total, self.options.interval, total - self.options.full_last)

    def _shares(self, leader: str, turn: int) -> dict[str, float]:
        """Return what each answer counts for; the mean of the weights, the shares times N, is 1."""
        others = len(self.weights) - 1
        start = max(1.0, others + 0.5 if self.options.dominance is None else self.options.dominance)
        dominance = 1 + (start - 1) * self.options.decay**turn
        whole = dominance + others
        return {name: (dominance if name == leader else 1.0) / whole for name in self.weights}

    def _reuse(self, step: Step, *, leads: bool) -> int:
        options = self.options
        outer = step.index < options.full_first or step.index >= step.total - options.full_last
        if outer or options.interval == 1 or (leads and step.index in self.refreshes(step.total)):
            return 0
        return min(step.index, options.max_age or step.index)


@COMPOSERS.register("cmlora")
class CmLora(Composer):
    """Average the adapters' answers as Composite does, and compute few of them whole.

    Each adapter keeps its own deep features. At a refresh the adapter that leads is evaluated whole and the
    others from their features; at all other steps everybody is. The leader's answer counts for more, at
    first: ``c(q) = 1 + (c0 - 1) * decay^q`` times as much as another's at the q-th refresh. Adapters that
    bring in high frequencies take turns to lead until the boundary, those of low frequencies from there on;
    which they are is measured once on the base (``composition/profiles.py``) or said with ``roles``. A step
    costs ``N f + (1 - f) r`` evaluations with N adapters, f the cost of an evaluation from features, and r
    the mean number of adapters that are evaluated whole.
    Cached Multi-LoRA, arXiv:2502.04923: refreshes every 2 steps in the first 37.5 % of a run and the last
    12.5 %, every 3 between them; c0 = N - 0.5; boundary 0.55 (step 120 of 220).

    Differs from the authors' code: there the non-uniform schedule caches nothing, the decay has no effect and
    would go below 1, features are not refreshed after the boundary, and roles come from file names; here they
    work as the paper means them. Beyond it: the first and the last step are whole for everybody, and no
    refresh comes right before these last ones, as nothing would reuse it. More whole steps are the dearest
    part of a short run: with two at each end three adapters at interval 3 and cut "fast" cost 1.09 times what
    the base does at 50 steps of SD 1.5, with one 1.00 times. The boundary is a place of the run: to find it
    in the latents, as the authors' online variant does, would wait for the GPU at each step.

    Where an evaluation from features begins, and its f counted at 512 px (SD 1.5) and 1024 px (SDXL): "fast"
    is one layer of the outer level (0.22; SDXL 0.04), "quality" two, the paper's choice (0.38; SDXL 0.07),
    "deep" also one layer of the second level (0.56; SDXL 0.21). SDXL has no attention in its outer level, so
    with the first two most adapters act there through old features alone: take "deep" or a short interval.
    """

    class Options(MethodOptions):
        """Options of CMLoRA."""

        roles: dict[str, Literal["high", "low"]] = Field(
            default_factory=dict,
            description="Who leads early (high frequencies) and who late (low), by name; where not given it "
            "is measured. Given for all, nothing is measured and they lead in the order of the adapters.",
        )
        split: Literal["sign", "means"] = Field(
            "sign",
            description="What counts as high: more high frequencies than the base has, or the upper of two "
            "groups (2-means).",
        )
        boundary: float = Field(
            0.55, ge=0, le=1, description="Where late adapters take over, as a fraction of the run."
        )
        dominance: float | None = Field(
            None,
            ge=1,
            description="How many times as much as another's the leader's answer counts at first; default: "
            "the number of adapters less 0.5.",
        )
        decay: float = Field(
            0.5, ge=0, le=1, description="What is left of its advantage from one refresh to the next."
        )
        interval: int | None = Field(
            None,
            ge=1,
            description="Steps from one refresh to the next; 1 caches nothing. Default: 2, in the middle of "
            "the run 3.",
        )
        full_first: int = Field(
            1, ge=1, description="Steps at the start at which all adapters are computed whole."
        )
        full_last: int = Field(
            1, ge=0, description="Steps at the end at which all adapters are computed whole."
        )
        max_age: int | None = Field(
            None,
            ge=1,
            description="The most steps that features may be old; older ones are computed anew. Default: no "
            "limit, so an adapter's stay as they are until it leads.",
        )
        cut: Literal["fast", "quality", "deep"] = Field(
            "fast",
            description="How much is computed from kept features: fast least, quality as the paper, deep for "
            "SDXL.",
        )
        text_encoder_policy: TextPolicy = "merged"

    def prepare(
        self,
        adapters: "Mapping[str, Adapter]",
        weights: Mapping[str, float],
        base: BaseInfo | None = None,
        request: Request | None = None,
    ) -> CmLoraPlan:
        """Return the plan; measures adapters without roles that were not measured on this base before.

        Raises:
            CompositionError: If there is no adapter, or roles name none.
            BaseNeeded: If adapters were not measured before, and there is no base to measure on.
        """
        high, low = self._sides(adapters, base)
        policy = self.options.text_encoder_policy
        return CmLoraPlan(
            (*high, *low),
            weights=dict(weights),
            early=high or low,
            late=low or high,
            options=self.options,
            cut=_CUTS[self.options.cut],
            text_weights=text_weights(policy, weights),
            texts={name: Text({name: weights[name]}) for name in adapters} if policy == "own" else {},
        )

    def _sides(
        self, adapters: "Mapping[str, Adapter]", base: BaseInfo | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the adapters of high and those of low frequencies, the highest first."""
        roles = self.options.roles
        check_some("cmlora", adapters)
        known("roles", list(roles), list(adapters))
        asked = [name for name in adapters if name not in roles]
        if not asked or len(adapters) == 1:
            order, measured = list(adapters), list(adapters)
        else:
            scores = _scores(adapters, asked, base)
            order = sorted(adapters, key=lambda name: -scores[name])
            measured = order[: _split([scores[name] for name in order], self.options.split)]
        high = [name for name in order if roles.get(name, "high" if name in measured else "low") == "high"]
        return tuple(high), tuple(name for name in order if name not in high)


def _scores(
    adapters: "Mapping[str, Adapter]", asked: Sequence[str], base: BaseInfo | None
) -> dict[str, float]:
    from studio.composition.profiles import known_profiles, profile

    base = base or BaseInfo()
    if base.pipe is not None:
        found = profile(base.pipe, adapters)
    else:
        found = {} if base.fingerprint is None else known_profiles(base.fingerprint, adapters)
    if unknown := [name for name in adapters if name not in found]:
        roles = ", ".join(f'"{name}": "high"' for name in asked)
        raise BaseNeeded(
            f"which frequencies {', '.join(map(repr, unknown))} bring in is measured once on the base and "
            "kept; that was not done yet, and no base was given. Measure with 'studio compose --profile' or "
            "studio.profile(), compose on a pipeline, or give a role, high or low, to each: "
            f"roles={{{roles}}}."
        )
    return {name: each.score for name, each in found.items()}


def _split(scores: Sequence[float], how: Literal["sign", "means"]) -> int:
    """Return how many of the scores, which descend, are high."""
    if how == "sign":
        return sum(score > 0 for score in scores)

    def spread(group: Sequence[float]) -> float:
        mean = sum(group) / len(group)
        return sum((score - mean) ** 2 for score in group)

    # In one dimension the groups of 2-means are neighbours, so each cut can be tried.
    return min(range(1, len(scores)), key=lambda cut: spread(scores[:cut]) + spread(scores[cut:]))


@cache
def _refreshes(total: int, interval: int | None, whole_from: int) -> tuple[int, ...]:
    """Return the steps of a run at which a leader's features are computed anew.

    Args:
        total: Steps of the run.
        interval: From one to the next; None for the paper's.
        whole_from: The step from which on everything is whole: the one right before it is left out.
    """
    steps, place = [], 0
    while place < total:
        steps.append(place)
        place += interval or (3 if 0.375 <= place / total < 0.875 else 2)
    left_out = whole_from - 1 if whole_from < total else None
    return tuple(step for step in steps if not step or step != left_out)
