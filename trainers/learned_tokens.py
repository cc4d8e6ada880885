"""A new token whose embeddings are trained; every other one stays what it is. arXiv:2208.01618."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from studio.data.batches import derived_seed
from studio.errors import TrainingError, UsageError
from studio.models.tokens import AddedTokens, text_encoders, tokenizer_of
from studio.trainers.base import ParameterGroup
from studio.trainers.layer_method import copied
from studio.trainers.token_options import TokenOptions


class LearnedToken:
    """One new token in a pipeline, with trainable embeddings in fp32.

    The encoders' own embeddings stand beside the new ones, frozen and untouched.

    Args:
        pipe: The base.
        options: Name a token.
        seed: Decides the start where no words are given.

    Raises:
        UsageError: If the token exists already, or the words for its start do not fit.
    """

    def __init__(self, pipe: Any, options: TokenOptions, *, seed: int) -> None:
        assert options.token is not None
        self._token = options.token
        self._added = AddedTokens(pipe, {self._token: start_of(pipe, options, seed=seed)})
        for parameter in self._rows.values():
            parameter.requires_grad_(True)
        self._added.attach()

    @property
    def _rows(self) -> dict[str, nn.Parameter]:
        return {name: embedding.new.weight for name, embedding in self._added.embeddings.items()}

    def groups(self, learning_rate: float) -> list[ParameterGroup]:
        """Return the embeddings by component.

        Weight decay would pull them to zero, away from where the encoder's own embeddings are.
        """
        return [
            ParameterGroup(component, [rows], learning_rate, decays=False)
            for component, rows in self._rows.items()
        ]

    def hold(self) -> None:
        """Keep the embeddings as they are at the optimizer step that comes next."""
        for rows in self._rows.values():
            rows.grad = None

    def export(self) -> dict[str, dict[str, Tensor]]:
        """Return the token with its embeddings ``[vectors, width]`` by component, fp32 on the CPU."""
        return {self._token: {component: copied(rows) for component, rows in self._rows.items()}}

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context without the token."""
        return self._added.suspended()

    def release(self) -> None:
        """Take the token away; may be called at any time."""
        self._added.detach()


def start_of(pipe: Any, options: TokenOptions, *, seed: int) -> dict[str, Tensor]:
    """Return what a token's embeddings ``[vectors, width]`` start from, fp32 by component.

    The words' embeddings, over and over where there are more vectors; without words random ones of the mean
    and spread that the vocabulary has in each direction.

    Raises:
        UsageError: If the words have more tokens than there are vectors.
    """
    found: dict[str, Tensor] = {}
    for component, encoder in text_encoders(pipe).items():
        own = encoder.get_input_embeddings().weight.detach()
        if options.init_words:
            tokenizer = tokenizer_of(pipe, component)
            ids = tokenizer(options.init_words, add_special_tokens=False).input_ids
            if len(ids) > options.vectors:
                raise UsageError(
                    f"init_words '{options.init_words}' are {len(ids)} tokens for this base "
                    f"({' '.join(tokenizer.convert_ids_to_tokens(ids))}), the token has {options.vectors}. "
                    "Raise vectors, or choose fewer or simpler words."
                )
            found[component] = own[[ids[number % len(ids)] for number in range(options.vectors)]].float()
        else:
            generator = torch.Generator().manual_seed(
                derived_seed(seed, component, str(options.token), "start")
            )
            drawn = torch.randn((options.vectors, own.shape[1]), generator=generator)
            spread, mean = torch.std_mean(own.float().cpu(), dim=0)
            found[component] = mean + spread * drawn
    return found


def check_captions(
    pipe: Any, options: TokenOptions, captions: Sequence[str], *, max_tokens: int | None
) -> None:
    """Check that a caption names the token, and early enough to be read.

    Args:
        pipe: The base.
        options: Name the token.
        captions: Of all pictures.
        max_tokens: The most tokens of a caption that are read; None for all.

    Raises:
        UsageError: If the token exists already.
        TrainingError: If none names it.
    """
    with AddedTokens(pipe, {str(options.token): start_of(pipe, options, seed=0)}):
        tokenizer = tokenizer_of(pipe, "text_encoder")

        def names(caption: str) -> bool:
            tokens = tokenizer.tokenize(caption)
            if options.token not in tokens:
                return False
            return max_tokens is None or tokens.index(options.token) + options.vectors <= max_tokens

        if not any(map(names, dict.fromkeys(captions))):
            example = captions[0] if captions else ""
            within = "" if max_tokens is None else f" within max_token_length ({max_tokens})"
            raise TrainingError(
                f"no caption names the token '{options.token}'{within}, so nothing would teach it; the first "
                f"is '{example}'. Put it into the prompt or the captions, or give it as trigger."
            )
