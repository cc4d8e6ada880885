"""Evaluate the branches of a step: each with its adapters in the weights, or all in one batch.

Three ways that agree within rounding. *Materialised*: the bank gives the denoiser a branch's effective
weights, one evaluation after the other; between changes no operation is added. *Batched*: branches stand side
by side in one batch and each row meets the low-rank changes of its own branch. *Live*: where weights cannot
be written (quantised, or offloaded layer by layer or with streams) low-rank changes are added to what the
layers give.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.adapter import Adapter, Change
from studio.adapters.bank import Recipe, WeightBank
from studio.adapters.live import Changes, LiveLayers
from studio.adapters.parameters import find_parameter
from studio.composition.call import Call, joined
from studio.composition.plan import Branch, LayerWeights, layers_over
from studio.errors import CompositionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One branch to evaluate, for the rows that it answers for.

    Attributes:
        branch: Whose weights act.
        call: Of the denoiser.
        shallow: Whether the deep features come from the branch's slot.
    """

    branch: Branch
    call: Call
    shallow: bool = False

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.call.latents)


Keep = Callable[[Sequence[Job]], AbstractContextManager[None]]


@dataclass
class Passes:
    """What the denoiser has done, in rows of a batch.

    Attributes:
        full: Rows evaluated whole.
        shallow: Rows of which only the shallow part was computed.
        asked: Rows that the pipeline called for: what the base alone would have evaluated.
    """

    full: int = 0
    shallow: int = 0
    asked: int = 0


class Executor:
    """Gives the denoiser the weights of branches and evaluates them.

    Args:
        components: Of the pipeline, by name.
        adapters: By the names that branches use.
        live: Weights cannot be written.
        batched: Put the branches of a step into one batch where their adapters allow it.
        memory: Bytes that formed weights may take beside the pristine ones; None for a share of what is free.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        adapters: Mapping[str, Adapter],
        *,
        live: bool = False,
        batched: bool = True,
        memory: int | None = None,
    ) -> None:
        self.passes = Passes()
        self._components = components
        self._adapters = adapters
        self._batched = batched
        self._memory = memory
        self._changes: dict[Hashable, Changes] = {}
        self._recipes: dict[Hashable, Recipe] = {}
        self._able: dict[Hashable, bool] = {}
        self._acting: Hashable = None
        self._writes = not live
        self._bank: WeightBank | None = None
        self._live: LiveLayers | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._writes:
            names = {name for adapter in self._adapters.values() for name in adapter.changes}
            bank = WeightBank(self._components, filter(of_denoiser, sorted(names)), budget=self._memory)
            self._bank = self._stack.enter_context(bank)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        # What belongs to the bank and the layers that are left.
        self._bank = self._live = self._acting = None
        self._recipes.clear()

    def check(self) -> None:
        """Make good what offloading, turned on or off since, did to the denoiser's layers.

        Raises:
            CompositionError: If it has taken weights away that were to be written to.
        """
        if self._live is not None:
            self._live.attach()
        written = () if self._bank is None else self._bank.names
        if any(find_parameter(self._components, name).is_meta for name in written):
            raise CompositionError(
                "the UNet was offloaded layer by layer inside the 'with' block, with the adapters' changes "
                "in its weights. Load the base anew and offload it before compose()."
            )

    def act(self, branch: Branch) -> None:
        """Give the denoiser the weights of a branch, unless it has them."""
        if branch.weighting == self._acting:
            return
        # Should applying fail, nothing is known to act.
        self._acting = None
        if self._bank is None:
            self._layers().apply(self._changes_of(branch))
        else:
            if self._live is not None:
                self._live.apply({})
            if branch.weighting not in self._recipes:
                self._recipes[branch.weighting] = self._bank.recipe(self._changes_of(branch))
            self._bank.apply(self._recipes[branch.weighting])
        self._acting = branch.weighting

    def answers(self, forward: Callable[..., Any], jobs: Sequence[Job], keep: Keep) -> list[Tensor]:
        """Return each job's answer ``[rows, C, H, W]``.

        Args:
            forward: The denoiser's.
            jobs: What to evaluate.
            keep: Gives the context in which jobs, all full or all shallow, are evaluated in one batch.
        """
        if self._batched and len(jobs) > 1:
            try:
                return self._together(forward, jobs, keep)
            except torch.OutOfMemoryError:
                logger.warning(
                    "the memory is not enough for all branches of a step in one batch; they are evaluated "
                    "one after the other from here on."
                )
                self._batched = False
        return [self._evaluate(forward, [job], keep)[0] for job in jobs]

    def _together(self, forward: Callable[..., Any], jobs: Sequence[Job], keep: Keep) -> list[Tensor]:
        """Evaluate in as few batches as possible: one of full passes, one of shallow ones."""
        found: dict[int, Tensor] = {}
        for shallow in (False, True):
            group = {place: job for place, job in enumerate(jobs) if job.shallow == shallow}
            alike = len({job.branch.weighting for job in group.values()}) == 1
            batches = (
                [group]
                if alike or all(self._can_be_live(job.branch) for job in group.values())
                else [{place: job} for place, job in group.items()]
            )
            for batch in filter(None, batches):
                answers = self._evaluate(forward, list(batch.values()), keep)
                found.update(zip(batch, answers, strict=True))
        return [found[place] for place in range(len(jobs))]

    def _evaluate(self, forward: Callable[..., Any], jobs: Sequence[Job], keep: Keep) -> list[Tensor]:
        """Evaluate jobs, all full or all shallow, in one pass."""
        rows = [job.rows for job in jobs]
        if len({job.branch.weighting for job in jobs}) == 1:
            self.act(jobs[0].branch)
        else:
            self._act_by_row(jobs)
        with keep(jobs):
            answer = joined([job.call for job in jobs]).evaluate(forward)
        if jobs[0].shallow:
            self.passes.shallow += sum(rows)
        else:
            self.passes.full += sum(rows)
        return list(answer.split(rows))

    def _act_by_row(self, jobs: Sequence[Job]) -> None:
        layout = (tuple(job.branch.weighting for job in jobs), tuple(job.rows for job in jobs))
        if layout == self._acting:
            return
        self._acting = None
        if self._bank is not None:
            self._bank.apply({})
        index = [place for place, job in enumerate(jobs) for _ in range(job.rows)]
        self._layers().apply_indexed([self._changes_of(job.branch) for job in jobs], rows=index)
        self._acting = layout

    def _layers(self) -> LiveLayers:
        if self._live is None:
            names = {
                name
                for adapter in self._adapters.values()
                if self._bank is None or _why_not_live(adapter.changes.items()) is None
                for name in adapter.changes
                if of_denoiser(name)
            }
            self._live = self._stack.enter_context(LiveLayers(self._components, sorted(names)))
        return self._live

    def _changes_of(self, branch: Branch) -> Changes:
        if branch.weighting not in self._changes:
            self._changes[branch.weighting] = collect(self._adapters, branch, of=of_denoiser)
        return self._changes[branch.weighting]

    def _can_be_live(self, branch: Branch) -> bool:
        if branch.weighting not in self._able:
            self._able[branch.weighting] = LiveLayers.why_not(self._changes_of(branch)) is None
        return self._able[branch.weighting]


def _why_not_live(changes: Iterable[tuple[str, Change]]) -> str | None:
    return LiveLayers.why_not({name: [(change, 1.0)] for name, change in changes if of_denoiser(name)})


def of_denoiser(parameter: str) -> bool:
    """Return whether a parameter is one of the denoiser."""
    return parameter.startswith("unet.")


def of_encoders(parameter: str) -> bool:
    """Return whether a parameter is one of a text encoder."""
    return not of_denoiser(parameter)


def collect(
    adapters: Mapping[str, Adapter], branch: Branch, *, of: Callable[[str], bool]
) -> dict[str, list[tuple[Change, float]]]:
    """Return each parameter's changes with weights; weight 0 is left out: it is the base bit for bit.

    Raises:
        CompositionError: If a layer that weights name is none that the adapter changes.
    """
    found: dict[str, list[tuple[Change, float]]] = {}
    for name in branch.weights:
        _check_layers(name, branch.weights[name], adapters[name])
        for parameter, change in adapters[name].changes.items():
            weight = branch.weight(name, parameter)
            if weight and of(parameter):
                found.setdefault(parameter, []).append((change, weight))
    return found


def _check_layers(name: str, weight: float | LayerWeights, adapter: Adapter) -> None:
    if not isinstance(weight, Mapping):
        return
    changed = {layer for parameter in adapter.changes for layer in layers_over(parameter)}
    idle = [layer for layer in weight if layer not in changed]
    if idle:
        raise CompositionError(
            f"weights of '{name}' name layers that it does not change: {', '.join(idle)}. Name dotted "
            "prefixes of its parameters, such as 'unet.up_blocks.1'."
        )
