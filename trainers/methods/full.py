"""Full fine-tuning: every number of the chosen layers learns. The classic baseline, as in DreamBooth.

arXiv:2208.12242 trains the whole UNet; Custom Diffusion, arXiv:2212.04488, only the keys and values of
cross-attention: ``blocks = ["attn2.to_k", "attn2.to_v"]``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from studio.registry import TRAINERS
from studio.specs.base import Options
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from studio.adapters.adapter import Adapter
    from studio.trainers.full_parameters import FullParameters


class FullOptions(Options):
    """Options of the method ``full``."""

    blocks: tuple[str, ...] = Field(
        (),
        description="Layers that learn: parts of their names, such as 'up_blocks.1' or 'attn2.to_k'; "
        "default: all of them.",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Layers left out: parts of their names, such as 'down_blocks.0' or 'attn1'."
    )
    train_text_encoder: bool = Field(False, description="Also train the layers of the text encoder(s).")


@TRAINERS.register("full")
class Full(Trainer):
    """Train the base's own weights, all or those of chosen blocks: large files and the most memory.

    The copies that are trained are fp32 and stand in the weights' places.
    """

    Options = FullOptions

    def __init__(self) -> None:
        self._parameters: FullParameters | None = None

    @classmethod
    def learning_rate(cls, spec: TrainSpec) -> float:
        """Return 1e-5, between DreamBooth's 5e-6 and what AdamW bears with a few hundred steps.

        It moves every weight by about that much a step, whatever the gradient's size, and trained weights
        are of the order of 1e-2.
        """
        return 1e-5

    @classmethod
    def refuses_quantized(cls, options: Any, kind: str) -> str:
        """Return that the weights themselves are what learns."""
        return "full trains the base's own weights, and quantised ones cannot learn"

    @property
    def aside(self) -> "Sequence[Tensor]":
        """The base's own weights, in whose places the copies stand."""
        return () if self._parameters is None else self._parameters.aside

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Put the copies in place and return them by component.

        Raises:
            TrainingError: If the pipeline has layers of peft, a part of a name matches nothing, or nothing is
                left to train.
        """
        from studio.trainers.full_parameters import FullParameters

        options = spec.options
        assert isinstance(options, FullOptions)
        self._parameters = FullParameters(
            pipe, blocks=options.blocks, exclude=options.exclude, text_encoders=options.train_text_encoder
        )
        return self._parameters.groups(spec)

    @property
    def parameters(self) -> "FullParameters":
        """What is trained, once the method is prepared."""
        assert self._parameters is not None
        return self._parameters

    def export(self) -> "Adapter":
        """Return the differences as they are now."""
        from studio.adapters.adapter import Adapter

        return Adapter(name="full", kind="full", changes=self.parameters.changes())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Return a context with the base's own weights."""
        self.parameters.detach()
        try:
            yield
        finally:
            self.parameters.attach()

    def release(self) -> None:
        """Put the base's own weights back, the same tensors; may be called at any time."""
        if self._parameters is not None:
            self._parameters.detach()
