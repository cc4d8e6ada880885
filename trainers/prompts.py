"""Captions as the denoiser is given them in training: encoded as prompts of drawing are, and kept."""

from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from studio.data.cache import Cache, Tensors
from studio.models.prompt_encoding import PromptEncoder


class Embedded(NamedTuple):
    """Captions as the denoiser is given them.

    Attributes:
        embeddings: ``[B, tokens, width]``.
        pooled: SDXL's, ``[B, width]``; else None.
        mask: 1 where a row of the embeddings is of its caption, 0 where it fills a shorter one up,
            ``[B, tokens]`` fp32; None where all are as long.
    """

    embeddings: Tensor
    pooled: Tensor | None
    mask: Tensor | None


class Prompts:
    """Prompt embeddings of captions, by the pipeline's own encoding, chunk by chunk as drawing reads them.

    No character of a caption means anything else. Captions of fewer chunks than others of a batch are filled
    up to their length and the rest masked, so that each acts as it does alone and as it is drawn.

    Args:
        pipe: Its text encoders are used as they are at each call.
        cache: Keeps embeddings, or None.
        recurring: The captions worth keeping; None for all.
        trained: Whether the text encoders are, so that gradients reach them and nothing is kept.
        max_tokens: The most tokens of a caption that are read, start and end not counted; None for all.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        cache: Cache | None = None,
        recurring: Container[str] | None = None,
        trained: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self._encoder = PromptEncoder(pipe, raw=True, max_tokens=max_tokens)
        self._cache = cache
        self.trained = trained
        self._recurring = recurring
        # SDXL draws the empty prompt as zeros; samples without their caption must look the same.
        self._zero_empty = bool(pipe.config.get("force_zeros_for_empty_prompt", False))

    def __call__(self, captions: Sequence[str], device: torch.device) -> Embedded:
        """Return captions on a device."""
        if self.trained:
            embeddings, pooled = self._encode(captions, device)
            chunks = [self._encoder.num_chunks(caption) for caption in captions]
            lengths = [number * embeddings.shape[1] // max(chunks) for number in chunks]
            return Embedded(embeddings, pooled, _mask(lengths, device))
        # One by one, because a batch of others may round otherwise.
        known = {caption: self._tensors(caption, device) for caption in dict.fromkeys(captions)}
        found = [known[caption] for caption in captions]
        rows = [item["embeddings"][0].to(device) for item in found]
        return Embedded(
            pad_sequence(rows, batch_first=True),
            torch.cat([item["pooled"].to(device) for item in found]) if "pooled" in found[0] else None,
            _mask([len(each) for each in rows], device),
        )

    def encode(self, captions: Iterable[str], device: torch.device) -> None:
        """Encode captions ahead of their use."""
        for caption in captions:
            self._tensors(caption, device)

    def _tensors(self, caption: str, device: torch.device) -> Tensors:
        def make() -> Tensors:
            # The same inside a step, which computes in mixed precision, and before the first.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                embeddings, pooled = self._encode([caption], device)
            return {"embeddings": embeddings} | ({} if pooled is None else {"pooled": pooled})

        if self._cache is None or (self._recurring is not None and caption not in self._recurring):
            return make()
        return self._cache.get({"caption": caption}, make)

    def _encode(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        encoded: tuple[Any, ...] = self._encoder(
            prompt=list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        embeddings: Tensor = encoded[0]
        pooled: Tensor | None = encoded[2] if len(encoded) == 4 else None
        if self._zero_empty and "" in captions:
            keep = torch.tensor([caption != "" for caption in captions], device=embeddings.device)
            embeddings = embeddings * keep[:, None, None]
            pooled = None if pooled is None else pooled * keep[:, None]
        return embeddings, pooled


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return the mask of ``Embedded`` for captions of so many rows."""
    if len(set(lengths)) == 1:
        return None
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float().to(device)
