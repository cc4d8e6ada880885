"""Teach the starter's CLIPTextModel to read captions: subject, style and background from its last state.

Stable Diffusion's text encoder is trained before and apart from the UNet; so is this one. Its embeddings are
then fixed.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from studio.assets.builder.captions import caption
from studio.assets.builder.subjects import BACKGROUNDS, STYLES, SUBJECTS

WIDTH = 128
_LAYERS = 3


def new_text_encoder(tokenizer: CLIPTokenizer, *, seed: int = 0) -> CLIPTextModel:
    """Return an untrained text encoder for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return ``[N, 77]`` token ids, as the diffusers pipelines make them."""
    ids: Tensor = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids


class _Readout(nn.Module):
    """Linear heads that name what a caption says; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Linear(WIDTH, count) for count in (len(SUBJECTS), len(STYLES), len(BACKGROUNDS))
        )

    def forward(self, hidden: Tensor, ends: Tensor) -> list[Tensor]:
        pooled = hidden[torch.arange(len(hidden)), ends]
        return [head(pooled) for head in self.heads]


def train_text_encoder(
    model: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    strangers: tuple[str, ...],
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """Train the encoder in place and return the share of fresh captions read right in all three respects."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    readout = _Readout()
    # Plain matrix products: on CPUs the fused attention's backward is several times slower in bf16.
    model.set_attn_implementation("eager")
    parameters = [*model.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        labels = [
            (rng.randrange(len(SUBJECTS)), rng.randrange(len(STYLES)), rng.randrange(len(BACKGROUNDS)))
            for _ in range(count)
        ]
        grounds = list(BACKGROUNDS)
        texts = [caption(SUBJECTS[s], STYLES[t], grounds[b], rng, strangers=strangers) for s, t, b in labels]
        return token_ids(tokenizer, texts), torch.tensor(labels)

    def read(ids: Tensor) -> list[Tensor]:
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            named: list[Tensor] = readout(model(ids).last_hidden_state, ends)
        return named

    progress = tqdm(range(steps), desc="text encoder", mininterval=5)
    for step in progress:
        ids, labels = examples(batch)
        parts = [F.cross_entropy(logits.float(), labels[:, head]) for head, logits in enumerate(read(ids))]
        loss = torch.stack(parts).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        ids, labels = examples(1024)
        right = torch.stack([logits.argmax(1) == labels[:, head] for head, logits in enumerate(read(ids))])
    return float(right.all(0).float().mean())


@torch.no_grad()
def embed(model: CLIPTextModel, ids: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the last hidden states ``[N, 77, WIDTH]`` of many captions."""
    return torch.cat([model(chunk).last_hidden_state.to(dtype) for chunk in ids.split(256)])
