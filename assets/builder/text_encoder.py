"""Teach the starter's CLIP text encoders to read captions: subject, style and background.

Stable Diffusion's text encoders are trained before and apart from the UNet; so are these. A readout names
what a caption says from the very states that the pipeline hands to the UNet, and is thrown away.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from studio.assets.builder.captions import caption
from studio.assets.builder.subjects import Vocabulary
from studio.assets.builder.training import Machine, Schedule, Training, train


@dataclass(frozen=True)
class TextSpec:
    """Shape of one text encoder.

    Attributes:
        width: Channels of its states.
        layers: Transformer layers.
        heads: Attention heads.
        projected: Whether it also gives a pooled embedding, as SDXL's second encoder does.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    projected: bool = False


def new_text_encoder(tokenizer: CLIPTokenizer, spec: TextSpec, *, seed: int = 0) -> PreTrainedModel:
    """Return an untrained text encoder for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    kind = CLIPTextModelWithProjection if spec.projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=spec.width,
            intermediate_size=4 * spec.width,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=spec.width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return ``[N, 77]`` token ids, as the diffusers pipelines make them."""
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids


def read(encoders: Sequence[PreTrainedModel], ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a pipeline hands to the UNet: the states ``[N, 77, width]`` and the pooled embedding.

    One encoder is read as Stable Diffusion 1.x does, from its last states; two as SDXL does, from their last
    but one, side by side, with the second one's projection ``[N, width]`` as the pooled embedding.
    """
    if len(encoders) == 1:
        return encoders[0](ids).last_hidden_state, None
    answers = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
    return states, answers[-1].text_embeds


class _Readout(nn.Module):
    """Linear heads that name what states and pooled embeddings say."""

    def __init__(self, specs: Sequence[TextSpec], vocabulary: Vocabulary) -> None:
        super().__init__()
        counts = (len(vocabulary.subjects), len(vocabulary.styles), len(vocabulary.backgrounds))
        # Each encoder learns to read by itself: adapters may train one of them alone.
        self.widths = [spec.width for spec in specs]
        widths = [*self.widths, *(spec.width for spec in specs if spec.projected)]
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, count) for count in counts) for width in widths
        )

    def forward(self, states: Tensor, pooled: Tensor | None, ends: Tensor) -> list[list[Tensor]]:
        parts = list(states[torch.arange(len(states), device=states.device), ends].split(self.widths, -1))
        if pooled is not None:
            parts.append(pooled)
        readers: list[Any] = list(self.heads)
        return [[head(part) for head in heads] for heads, part in zip(readers, parts, strict=True)]


class _Readers(nn.Module):
    """The encoders with their readout: what is trained."""

    def __init__(self, encoders: Sequence[PreTrainedModel], readout: _Readout, *, end: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.readout = readout
        self.end = end

    def forward(self, ids: Tensor) -> list[list[Tensor]]:
        states, pooled = read(list(self.encoders), ids)
        named: list[list[Tensor]] = self.readout(states, pooled, (ids == self.end).int().argmax(1))
        return named


def train_text_encoders(
    encoders: Sequence[PreTrainedModel],
    specs: Sequence[TextSpec],
    tokenizer: CLIPTokenizer,
    vocabulary: Vocabulary,
    *,
    schedule: Schedule,
    machine: Machine,
    state: Path,
    strangers: tuple[str, ...],
    batch: int = 128,
    seed: int = 0,
) -> tuple[Training, float]:
    """Train the encoders in place; return the share of fresh captions that all of them read right."""
    torch.manual_seed(seed)
    for encoder in encoders:
        # Plain matrix products: on CPUs the fused attention's backward is several times slower in bf16.
        encoder.set_attn_implementation("eager")
    readers = _Readers(encoders, _Readout(specs, vocabulary), end=tokenizer.eos_token_id)
    readers.to(machine.torch_device)
    grounds = list(vocabulary.backgrounds)

    def examples(count: int, number: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(seed * 1_000_003 + number)
        sizes = (len(vocabulary.subjects), len(vocabulary.styles), len(grounds))
        labels = [tuple(rng.randrange(size) for size in sizes) for _ in range(count)]
        texts = [
            caption(vocabulary.subjects[s], vocabulary.styles[t], grounds[b], rng, strangers=strangers)
            for s, t, b in labels
        ]
        device = machine.torch_device
        return token_ids(tokenizer, texts).to(device), torch.tensor(labels, device=device)

    def named(ids: Tensor) -> list[list[Tensor]]:
        with machine.autocast():
            logits: list[list[Tensor]] = readers(ids)
        return [[head.float() for head in heads] for heads in logits]

    def loss_at(step: int) -> Tensor:
        ids, labels = examples(batch, step)
        losses = [
            F.cross_entropy(head, labels[:, column])
            for heads in named(ids)
            for column, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()

    training = train(readers, loss_at, schedule=schedule, machine=machine, state=state, name="text encoders")
    with torch.no_grad():
        ids, labels = examples(1024, -1)
        right = [
            head.argmax(1) == labels[:, column] for heads in named(ids) for column, head in enumerate(heads)
        ]
    return training, float(torch.stack(right).all(0).float().mean())
