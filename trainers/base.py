"""What a training method is to the loop."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from studio.specs.base import Options
from studio.specs.train import TrainSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from studio.adapters.adapter import Adapter


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: The component they act on: ``unet``, ``text_encoder``, ``text_encoder_2``.
        parameters: Leaves in fp32 that require gradients.
        learning_rate: Peak of the schedule.
    """

    name: str
    parameters: "Sequence[nn.Parameter]"
    learning_rate: float


class Trainer(Protocol):
    """One way to fit an adapter, registered in ``studio.trainers.methods``; torch-free at import.

    The loop lends it the base with every parameter frozen. Between ``prepare`` and ``release`` it may change
    the base's modules, never its weights in a way that ``release`` does not undo bit for bit.
    """

    Options: ClassVar[type[Options]]

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Attach to the base and return what is to be trained.

        Raises:
            TrainingError: If the options do not fit this base.
        """
        ...

    def after_step(self, step: int) -> None:
        """Do what the method does after optimizer step ``step``, counted from 1."""
        ...

    def export(self) -> "Adapter":
        """Return the adapter as it is now, on the CPU and independent of what is trained further."""
        ...

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context in which the base is as it was lent: for sample pictures."""
        ...

    def release(self) -> None:
        """Detach from the base, leaving modules, names and weights as they were lent."""
        ...
