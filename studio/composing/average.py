"""The mean of a plan's weights over its steps, and how far the steps are from it.

At step t the denoiser answers with the weights ``W0 + sum_b s_b D_b(t)``, b over the branches of the rows of
the prompt, s their shares; their mean is ``W0 + mean_t sum_b s_b D_b(t)``. Where a step has several branches
this is not what their mixed answers come from: answers are not linear in weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from studio.adapters.adapter import Adapter, Change
from studio.adapters.merge import SELF_CONTAINED
from studio.composition.executor import collect, of_denoiser, of_encoders
from studio.composition.plan import Branch, Plan, Step
from studio.errors import CompositionError

if TYPE_CHECKING:
    from torch import Tensor

Mixture = Mapping[int, Mapping[float, float]]
"""What a parameter is changed by: from the number of a change to its weights, with the share of each."""


@dataclass(frozen=True, eq=False)
class MeanChange:
    """Mean of one change at several weights, for kinds that are not linear in the weight.

    Attributes:
        change: The change.
        shares: By weight; they need not sum to 1.
    """

    change: Change
    shares: Mapping[float, float]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        return self.change.shape

    def delta(self, base: Tensor, *, weight: float) -> Tensor:
        """Return ``weight`` times the mean, fp32, of the base's shape and on its device."""
        parts = [share * self.change.delta(base, weight=each) for each, share in self.shares.items()]
        return weight * torch.stack(parts).sum(0)

    def low_rank(self) -> None:
        """Return None: it is not known in factors."""
        return None


class Average:
    """The mean of a plan over a full run.

    Args:
        plan: Without regions.
        adapters: All that the plan's branches name.
        total: Number of steps.

    Raises:
        CompositionError: If the run is too short for the plan, or no adapter file can hold what it does.
    """

    def __init__(self, plan: Plan, adapters: Mapping[str, Adapter], *, total: int) -> None:
        plan.check(total)
        self._adapters = {name: adapter for name, adapter in adapters.items() if adapter.changes}
        self._plan = plan
        self._changes: list[Change] = []
        self._names: list[str] = []
        self._places: dict[int, int] = {}
        for name, adapter in self._adapters.items():
            for change in adapter.changes.values():
                self._places[id(change)] = len(self._changes)
                self._changes.append(change)
                self._names.append(name)
        self._steps = [tuple(plan.at(Step(index, total, index / total))) for index in range(total)]
        self._check()
        # What acts in a step, and in how many of the steps.
        self._states = Counter(tuple(map(_key, _conditional(branches))) for branches in self._steps)
        examples = {tuple(map(_key, _conditional(each))): _conditional(each) for each in self._steps}
        self._mixtures = {key: self._mixture(branches) for key, branches in examples.items()}

    def adapters(self) -> tuple[dict[str, Adapter], dict[str, float]]:
        """Return adapters whose weighted sum is the mean, and their weights.

        An adapter whose mean weight differs from layer to layer is split.
        """
        means: dict[str, dict[int, dict[float, float]]] = {}
        total = len(self._steps)
        for key, count in self._states.items():
            for parameter, mixture in self._mixtures[key].items():
                own = means.setdefault(parameter, {})
                for place, weights in mixture.items():
                    shares = own.setdefault(place, {})
                    for weight, share in weights.items():
                        shares[weight] = shares.get(weight, 0.0) + share * count / total
        found: dict[tuple[str, float], dict[str, Change]] = {}
        for parameter, own in means.items():
            for place, shares in own.items():
                change, weight = self._changes[place], 1.0
                if isinstance(change, SELF_CONTAINED):
                    weight = math.fsum(each * share for each, share in shares.items())
                else:
                    change = MeanChange(change, shares)
                found.setdefault((self._names[place], weight), {})[parameter] = change
        split = {f"{name} at {weight:.9g}": (name, weight, part) for (name, weight), part in found.items()}
        adapters = {
            key: Adapter(key, self._adapters[name].kind, part) for key, (name, _, part) in split.items()
        }
        return adapters, {key: weight for key, (_, weight, _) in split.items()}

    def distance(
        self,
        written: Mapping[str, Change],
        *,
        parameter: Callable[[str], Tensor] | None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> float:
        """Return how far the weights of the steps are from those of one adapter.

        ``sqrt(sum_t |D(t) - B|^2 / sum_t |D(t)|^2)`` in the Frobenius norm over all parameters of the
        denoiser and the text encoders, D the change at a step and B the adapter's.

        Args:
            written: The adapter's changes.
            parameter: From a canonical name to the base's parameter, for kinds that depend on it.
            on_layer: Told how many parameters are done, and of how many.
        """
        missed = whole = 0.0
        names = list(dict.fromkeys(name for mixtures in self._mixtures.values() for name in mixtures))
        for done, name in enumerate(names):
            states: Counter[tuple[tuple[int, float, float], ...]] = Counter()
            for key, count in self._states.items():
                mixture = self._mixtures[key].get(name, {})
                terms = [
                    (place, each, share) for place, own in mixture.items() for each, share in own.items()
                ]
                states[tuple(sorted(terms))] += count
            base = parameter(name).cpu() if parameter else None
            made = self._delta(written[name], 1.0, base) if name in written else None
            for state, count in states.items():
                live = sum(
                    (
                        share * self._delta(self._changes[place], weight, base)
                        for place, weight, share in state
                    ),
                    start=torch.zeros(()),
                )
                off = live if made is None else live - made
                missed += count * float(off.double().square().sum())
                whole += count * float(live.double().square().sum())
            if on_layer:
                on_layer(done + 1, len(names))
        return math.sqrt(missed / whole) if whole else 0.0

    def lost(self) -> list[str]:
        """Return what the plan does beside weights, in words: no adapter file holds it."""
        notes = []
        if any(
            {_key(branch) for branch in branches if branch.answers_for("unconditional")}
            != {_key(branch) for branch in _conditional(branches)}
            for branches in self._steps
            if any(branch.answers_for("unconditional") for branch in branches)
        ):
            notes.append("the rows of the negative prompt have other weights; those of the prompt count")
        if any(len(_conditional(branches)) > 1 for branches in self._steps):
            notes.append("answers that are mixed become weights that are mixed, which is not the same")
        answered = {
            any(branch.answers_for("unconditional") for branch in branches) for branches in self._steps
        }
        if len(answered) > 1:
            notes.append("guidance, which the composition skips in some steps, counts in all")
        if any(branch.slot is not None for branches in self._steps for branch in branches):
            notes.append("features that a cache keeps are computed in every step")
        texts = {branch.text for branches in self._steps for branch in branches if branch.text is not None}
        if any(self._plan.texts[text].prompt is not None or self._plan.texts[text].without for text in texts):
            notes.append("prompts that the composition changes stay as they are")
        return notes

    def _check(self) -> None:
        if any(branch.region is not None for branches in self._steps for branch in branches):
            raise CompositionError(
                "this composition gives regions of the picture to adapters, which no adapter file can hold. "
                "Draw with the composition itself, or choose another method."
            )
        acting: set[str] = set()
        negative: set[str] = set()
        for branches in self._steps:
            for branch in branches:
                names = {name for name, weight in branch.weights.items() if weight}
                (acting if branch.answers_for("conditional") else negative).update(names)
        if only := negative - acting:
            raise CompositionError(
                f"'{min(only)}' acts on the rows of the negative prompt alone, which no adapter file can "
                "hold. Take it out of the composition, or let it act in all rows with a negative weight."
            )

    def _mixture(self, branches: Sequence[Branch]) -> dict[str, dict[int, dict[float, float]]]:
        """Return what each parameter is changed by in a step of these branches."""
        found: dict[str, dict[int, dict[float, float]]] = {}
        for branch in branches:
            plan = self._plan
            text = plan.text_weights if branch.text is None else plan.texts[branch.text].weights
            changes = collect(self._adapters, branch, of=of_denoiser)
            spoken = Branch({name: weight for name, weight in text.items() if name in self._adapters})
            changes |= collect(self._adapters, spoken, of=of_encoders)
            for parameter, uses in changes.items():
                own = found.setdefault(parameter, {})
                for change, weight in uses:
                    shares = own.setdefault(self._places[id(change)], {})
                    shares[weight] = shares.get(weight, 0.0) + branch.share
        return found

    @staticmethod
    def _delta(change: Change, weight: float, base: Tensor | None) -> Tensor:
        return change.delta(torch.empty(change.shape) if base is None else base, weight=weight).cpu()


def _conditional(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    return tuple(branch for branch in branches if branch.answers_for("conditional"))


def _key(branch: Branch) -> tuple[object, ...]:
    """Return what of a branch decides the weights that it answers with."""
    return branch.share, branch.weighting, branch.text
