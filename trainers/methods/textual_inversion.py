"""Textual inversion, arXiv:2208.01618: a new word whose embeddings have the base draw the subject."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pydantic import Field

from studio.registry import TRAINERS
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer
from studio.trainers.token_options import TokenOptions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from studio.adapters.adapter import Adapter
    from studio.trainers.learned_tokens import LearnedToken


class TextualInversionOptions(TokenOptions):
    """Options of the method ``textual-inversion``."""

    token: str = Field(
        "<new>",
        pattern=r"^\S+$",
        description="The new word to learn, such as '<toy>': captions must name it, and prompts do later.",
    )


@TRAINERS.register("textual-inversion")
class TextualInversion(Trainer):
    """Learn a new word of the prompt and nothing else: files of a few kilobytes."""

    Options = TextualInversionOptions
    format = "embedding"

    def __init__(self) -> None:
        self._learned: LearnedToken | None = None

    @classmethod
    def learning_rate(cls, spec: TrainSpec) -> float:
        """Return the paper's, of the token's embeddings."""
        return 5e-3

    @classmethod
    def check_captions(cls, pipe: "DiffusionPipeline", spec: TrainSpec, captions: Sequence[str]) -> None:
        """Check that one of the captions names the token."""
        from studio.trainers.learned_tokens import check_captions

        assert isinstance(spec.options, TextualInversionOptions)
        check_captions(pipe, spec.options, captions, max_tokens=spec.max_token_length)

    def prepare(self, pipe: "DiffusionPipeline", spec: TrainSpec) -> Sequence[ParameterGroup]:
        """Add the token and return its embeddings by component.

        Raises:
            TrainingError: If the pipeline has layers of peft.
            UsageError: If the token exists already, or the words for its start do not fit.
        """
        from studio.trainers.borrow import refuse_adapters
        from studio.trainers.learned_tokens import LearnedToken

        assert isinstance(spec.options, TextualInversionOptions)
        refuse_adapters(pipe)
        self._learned = LearnedToken(pipe, spec.options, seed=spec.seed)
        return self._learned.groups(spec.text_encoder_learning_rate or spec.unet_learning_rate)

    @property
    def learned(self) -> "LearnedToken":
        """The token, once the method is prepared."""
        assert self._learned is not None
        return self._learned

    def export(self) -> "Adapter":
        """Return the token as it is now."""
        from studio.adapters.adapter import Adapter

        return Adapter("textual-inversion", "textual-inversion", {}, self.learned.export())

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context without the token."""
        return self.learned.suspended()

    def release(self) -> None:
        """Take the token away; may be called at any time."""
        if self._learned is not None:
            self._learned.release()
