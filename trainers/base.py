"""What a training method is to the loop."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from studio.specs.base import Options
from studio.specs.train import TrainSpec

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from studio.adapters.adapter import Adapter
    from studio.trainers.processes import Processes


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: The component they act on: ``unet``, ``text_encoder``, ``text_encoder_2``.
        parameters: Leaves in fp32 that require gradients.
        learning_rate: Peak of the schedule.
        decays: Whether weight decay acts on them.
    """

    name: str
    parameters: "Sequence[nn.Parameter]"
    learning_rate: float
    decays: bool = True


class Trainer(Protocol):
    """One way to fit an adapter, registered in ``studio.trainers.methods``; torch-free at import.

    Methods derive from it: what has a body here is what they do unless they say otherwise. The loop lends
    them the base with every parameter frozen. Between ``prepare`` and ``release`` they may change the base's
    modules, never its weights in a way that ``release`` does not undo bit for bit.

    Attributes:
        Options: What a user may ask of the method beside what all methods know.
        format: File format written where none is asked for.
        companions: Words of the parts that the adapter's own file lacks: who uses it uses theirs, too.
    """

    Options: ClassVar[type[Options]]
    format: ClassVar[str] = "kohya"
    companions: ClassVar[tuple[str, ...]] = ()

    @property
    def aside(self) -> "Sequence[Tensor]":
        """What is kept beside base and trained parameters while the method is attached, to undo its work."""
        return ()

    @classmethod
    def learning_rate(cls, spec: TrainSpec) -> float:
        """Return the learning rate of the UNet where none is asked for."""
        return 1e-3

    @classmethod
    def remarks(cls, spec: TrainSpec, *, family: str, pictures: int) -> Sequence[str]:
        """Return what may be unintended about a run, one sentence each.

        Args:
            spec: The run.
            family: Of the base: "sd1", "sd2", "sd2-v" or "sdxl".
            pictures: How many there are.
        """
        return ()

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str | None:
        """Return why the method cannot work on weights quantised as "int8" or "nf4", or None where it can.

        Args:
            options: Its own.
            kind: Of the weights.
        """
        return None

    @classmethod
    def refuses_start(cls, options: Any) -> str | None:
        """Return why the method cannot start from an adapter's file and what to do, or None where it can.

        Args:
            options: Its own.
        """
        return "of the methods only lora, dora and b-lora start from a file. Leave it out."

    @classmethod
    def parts(cls, spec: TrainSpec) -> tuple[str, ...]:
        """Return words for parts of the adapter that get a file of their own; its name ends with the word."""
        return ()

    @classmethod
    def check_captions(cls, pipe: "DiffusionPipeline", spec: TrainSpec, captions: Sequence[str]) -> None:
        """Check before any work what captions must hold for the method.

        Raises:
            TrainingError: If it cannot learn from them.
        """

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Attach to the base and return what is to be trained.

        Raises:
            TrainingError: If the options do not fit this base.
        """
        ...

    def start_from(self, adapter: "Adapter") -> None:
        """Start from an adapter instead of from nothing; called once ``prepare`` is done.

        Raises:
            TrainingError: If it is of another kind or rank, or of other layers.
        """

    def warm_start(self, loss: "Callable[[int], Tensor]", processes: "Processes | None" = None) -> None:
        """Set what training starts from by what the data say; called once, before the first step of all.

        Args:
            loss: Returns the loss of the n-th batch, with its graph where gradients are on. Nothing is
                dropped out yet.
            processes: Those of which each has a share of that batch; None for this one alone.
        """

    def state(self) -> "Mapping[str, Tensor]":
        """Return what going on later needs beside the parameters, the optimizer and what ``prepare`` does."""
        return {}

    def load_state(self, state: "Mapping[str, Tensor]") -> None:
        """Take back what ``state`` returned; called in place of ``warm_start``.

        Afterwards the parameters have the lengths that they had then; their values are set next.
        """

    def values_set(self) -> None:
        """Take note that others than the optimizer have given the parameters other values."""

    def optimizer(
        self,
        groups: Sequence[ParameterGroup],
        *,
        name: str = "adamw",
        weight_decay: float,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> "torch.optim.Optimizer":
        """Return what updates the parameters.

        Raises:
            TrainingError: If the method cannot work with the optimizer of this name, it is not installed, or
                it does not take one of the options.
        """
        from studio.trainers.optimizers import make_optimizer

        return make_optimizer(name, groups, weight_decay=weight_decay, options=options)

    def before_clipping(self, step: int) -> None:
        """Do what the method does with the gradients of optimizer step ``step``, counted from 1.

        All of them are there, unscaled, of a loss that was finite, and not clipped yet. The method may also
        give its parameters and their gradients another length here.
        """

    def after_step(self, step: int) -> None:
        """Do what the method does after optimizer step ``step``, counted from 1."""

    def export(self) -> "Adapter":
        """Return the adapter as it is now, on the CPU and independent of what is trained further."""
        ...

    @classmethod
    def part(cls, adapter: "Adapter", word: str) -> "Adapter":
        """Return the part of an exported adapter that a word of ``parts`` stands for."""
        return adapter

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context in which the base is as it was lent: for sample pictures."""
        ...

    def release(self) -> None:
        """Detach from the base, leaving modules, names and weights as they were lent."""
        ...
