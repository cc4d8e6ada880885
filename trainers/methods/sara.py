"""SaRA, arXiv:2409.06633: the base's smallest weights are put to use, wherever they are."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.errors import TrainingError
from studio.registry import TRAINERS
from studio.specs.base import Options, complete
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from studio.adapters.adapter import Adapter, Change
    from studio.trainers.nuclear_norm import RankTerm
    from studio.trainers.sparse_parameters import SparseParameters

QUANTILE = 0.05
LEAST_RATE = 1e-5


class SaraOptions(Options):
    """Options of the method ``sara``."""

    threshold: float | None = Field(
        None,
        gt=0,
        description="Train as many entries of each weight as have a magnitude below this (paper: 0.002 for "
        "SD 1.5); what it selects depends on the base's scale.",
    )
    quantile: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Train this share of each weight's entries; default: {QUANTILE:g} without a threshold.",
    )
    selection: Literal["smallest", "largest", "random"] = Field(
        "smallest", description="Which entries train: those of smallest magnitude (SaRA), largest, or any."
    )
    rank_weight: float = Field(
        5e-4,
        ge=0,
        description="Weight (lambda) of the nuclear norm of linear layers and convolutions, which keeps the "
        "change's rank low; 0: off.",
    )
    rank_term_on: Literal["parameter", "delta"] = Field(
        "parameter", description="What the nuclear norm is of: the trained entries (SaRA) or their change."
    )
    rank_every: int = Field(
        1, ge=1, description="Steps from one matrix's nuclear norm to the next: more is faster."
    )
    reselect_at: int | None = Field(
        None,
        ge=0,
        description="Step after which only entries that are still selected train on; default: half the steps "
        "(random selection: never); 0: never.",
    )
    train_text_encoder: bool = Field(False, description="Also train the text encoder(s).")

    @field_validator("quantile")
    @classmethod
    def _one_of_two(cls, quantile: float | None, info: ValidationInfo) -> float | None:
        if quantile is not None and info.data.get("threshold") is not None:
            raise complete("threshold says the same in another way. Give one of the two.")
        return quantile

    @field_validator("reselect_at")
    @classmethod
    def _not_at_random(cls, step: int | None, info: ValidationInfo) -> int | None:
        if step and info.data.get("selection") == "random":
            raise complete("a random selection does not change with the values. Leave reselect_at out.")
        return step

    @property
    def share(self) -> float | None:
        """The quantile that counts, or None where the threshold does."""
        return None if self.threshold is not None else self.quantile or QUANTILE


@TRAINERS.register("sara")
class Sara(Trainer):
    """Train the few per cent of the base's own numbers that matter least, everywhere in the UNet."""

    Options = SaraOptions
    format = "sara"

    def __init__(self) -> None:
        self._parts: list[SparseParameters] = []
        self._rank_term: RankTerm | None = None
        # SparseAdamW sees itself that its vectors have changed.
        self._start_anew: Callable[[], None] | None = None
        self._steps = self._reselect_at = 0
        self._metadata: dict[str, str] = {}

    @property
    def aside(self) -> "Sequence[Tensor]":
        """Where the entries are and what they were."""
        return [value for part in self._parts for value in part.aside]

    @classmethod
    def learning_rate(cls, spec: TrainSpec) -> float:
        """Return the paper's ``1e-3 exp(-350 threshold)``, at least 1e-5; by quantile 1e-3.

        The paper tried thresholds up to 0.1, for which its formula gives next to nothing.
        """
        assert isinstance(spec.options, SaraOptions)
        threshold = spec.options.threshold
        return 1e-3 if threshold is None else max(1e-3 * math.exp(-350 * threshold), LEAST_RATE)

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str:
        """Return that the weights themselves are what learns."""
        return "sara trains entries of the base's own weights, and quantised ones cannot learn"

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Select the entries and return them as one vector per component.

        Raises:
            TrainingError: If the pipeline has layers of peft, nothing is selected, or an option does not fit
                the run.
        """
        options = spec.options
        assert isinstance(options, SaraOptions)
        self._steps = spec.steps
        self._reselect_at = self._when_to_reselect(spec.steps, options)
        self._parts = _select(pipe, options, seed=spec.seed)
        self._rank_term = _rank_term(pipe, self._parts, options, seed=spec.seed)
        self._metadata = {
            "studio.sara": json.dumps(
                {
                    "threshold": options.threshold,
                    "quantile": options.share,
                    "selection": options.selection,
                    "selected": sum(part.values.numel() for part in self._parts),
                    "reselect_at": self._reselect_at,
                    "rank_weight": options.rank_weight,
                    "rank_term_on": options.rank_term_on,
                    "dtype": str(pipe.unet.dtype).removeprefix("torch."),
                }
            )
        }
        for part in self._parts:
            part.attach()
        return [
            ParameterGroup(
                part.component,
                [part.values],
                spec.unet_learning_rate if part.component == "unet" else spec.encoder_learning_rate,
            )
            for part in self._parts
        ]

    def optimizer(
        self,
        groups: Sequence[ParameterGroup],
        *,
        name: str = "adamw",
        weight_decay: float,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> "torch.optim.Optimizer":
        """Return what updates the selected entries and writes them into the weights; AdamW does so at once.

        Raises:
            TrainingError: If the optimizer of this name is not installed, cannot work with these groups, or
                does not take one of the options.
        """
        from studio.trainers.optimizers import check_options
        from studio.trainers.sparse_optimizer import SparseAdamW, write_each_step

        # Of AdamW, too, which judges the options' values as torch's does.
        optimizer = super().optimizer(groups, name=name, weight_decay=weight_decay, options=options)
        if name == "adamw":
            check_options(name, SparseAdamW, options)
            rates = [group.learning_rate for group in groups]
            return SparseAdamW(self._parts, learning_rates=rates, weight_decay=weight_decay, **options)
        self._start_anew = write_each_step(optimizer, self._parts)
        return optimizer

    def state(self) -> "Mapping[str, Tensor]":
        """Return what the parts know of entries that are no longer trained."""
        return {
            f"{part.component}.{name}": value for part in self._parts for name, value in part.state().items()
        }

    def load_state(self, state: "Mapping[str, Tensor]") -> None:
        """Take back what ``state`` returned."""
        for part in self._parts:
            start = f"{part.component}."
            part.load_state({key.removeprefix(start): state[key] for key in state if key.startswith(start)})

    def values_set(self) -> None:
        """Write the values into the weights."""
        for part in self._parts:
            part.write()

    def before_clipping(self, step: int) -> None:
        """Select anew where that is due, and add the rank term's gradient."""
        if self._reselect_at and step == self._reselect_at + 1:
            if not sum(part.narrow() for part in self._parts):
                raise TrainingError(
                    f"after step {self._reselect_at} no entry would be selected any more, so nothing is left "
                    "to train. Lower learning_rate, or set reselect_at to 0."
                )
            if self._start_anew is not None:
                self._start_anew()
        if self._rank_term is not None:
            self._rank_term.add_gradient(step)

    def after_step(self, step: int) -> None:
        """After the last step, put the weights where the exported change will put them."""
        if step == self._steps:
            for part in self._parts:
                part.settle()

    def export(self) -> "Adapter":
        """Return the change as it is now; the weights are made to agree with it, whoever set the values."""
        from studio.adapters.adapter import Adapter

        self.values_set()
        changes: dict[str, Change] = {}
        for part in self._parts:
            changes |= part.export()
        return Adapter(name="sara", kind="sparse", changes=changes, metadata=self._metadata)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Return a context in which the weights are the base's."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.suspended())
            yield

    def release(self) -> None:
        """Give the weights the base's values bit for bit; may be called at any time."""
        for part in self._parts:
            part.release()

    @staticmethod
    def _when_to_reselect(steps: int, options: SaraOptions) -> int:
        if options.reselect_at is None:
            return 0 if options.selection == "random" else steps // 2
        if options.reselect_at >= steps:
            raise TrainingError(
                f"reselect_at must be less than the {steps} steps, got {options.reselect_at}. Lower it, or "
                "set it to 0 to turn it off."
            )
        return options.reselect_at


def _select(pipe: "DiffusionPipeline", options: SaraOptions, *, seed: int) -> "list[SparseParameters]":
    from studio.adapters.parameters import canonical_names, components_of, find_parameter
    from studio.trainers.borrow import refuse_adapters
    from studio.trainers.selection import Selection
    from studio.trainers.sparse_parameters import SparseParameters

    refuse_adapters(pipe)
    rule = Selection(options.selection, options.threshold, options.share, seed)
    parts = []
    for component, module in components_of(pipe).items():
        if component == "unet" or options.train_text_encoder:
            own = {component: module}
            weights = {name: find_parameter(own, name) for name in canonical_names(own)}
            parts.append(SparseParameters(component, weights, rule))
    if not any(part.values.numel() for part in parts):
        raise TrainingError(
            f"nothing of the base is selected by {'threshold' if options.share is None else 'quantile'} "
            f"{options.share or options.threshold:g}. Raise it."
        )
    return parts


def _rank_term(
    pipe: "DiffusionPipeline", parts: "Sequence[SparseParameters]", options: SaraOptions, *, seed: int
) -> "RankTerm | None":
    from torch import nn

    from studio.adapters.parameters import components_of
    from studio.trainers.nuclear_norm import LEAST_SIDE, RankTerm

    if not options.rank_weight:
        return None
    modules = (module for component in components_of(pipe).values() for module in component.modules())
    term = RankTerm(
        parts,
        weight=options.rank_weight,
        of=options.rank_term_on,
        every=options.rank_every,
        seed=seed,
        tables=[module.weight for module in modules if isinstance(module, nn.Embedding)],
    )
    if not len(term):
        raise TrainingError(
            f"no selected weight has two sides of {LEAST_SIDE}, so there is nothing for the rank term. "
            "Set rank_weight to 0."
        )
    return term
