"""SaRA as a dense problem: torch trains every weight, all but the chosen entries are put back each step."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from studio.specs import TrainSpec
from studio.trainers.methods.sara import Sara
from studio.trainers.sparse_parameters import SparseParameters

Masks = Mapping[str, Tensor]


def trainer_on(pipe: Any, *, steps: int = 10, **options: Any) -> tuple[Sara, list[SparseParameters], Any]:
    """Return a prepared trainer, its parts and its optimizer; the rank term and re-selection are off."""
    given = {"data": "d", "output": "o.safetensors", "method": "sara", "steps": steps}
    quiet = {"rank_weight": 0, "reselect_at": 0, "learning_rate": 1e-2}
    spec = TrainSpec.model_validate(given | quiet | options)
    trainer = Sara()
    groups = trainer.prepare(pipe, spec)
    return trainer, trainer._parts, trainer.optimizer(groups, weight_decay=spec.weight_decay)


def batch_loss(pipe: Any, seed: int, *, size: int = 2) -> Tensor:
    """Return the mean loss of the UNet on the random samples ``seed``, ``seed + 1``, ..."""
    draws = [torch.Generator().manual_seed(seed + sample) for sample in range(size)]
    latents, target = (torch.stack([torch.randn(4, 8, 8, generator=draw) for draw in draws]) for _ in "ab")
    width = pipe.unet.config.cross_attention_dim
    states = torch.stack([torch.randn(7, width, generator=draw) for draw in draws])
    timesteps = torch.tensor([(97 * (seed + sample)) % 1000 for sample in range(size)])
    added = None
    if pipe.unet.config.addition_embed_type:
        pooled = torch.stack([torch.randn(32, generator=draw) for draw in draws])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(size, 1)}
    dtype = pipe.unet.dtype
    if added is not None:
        added = {key: value.to(dtype) for key, value in added.items()}
    predicted = pipe.unet(latents.to(dtype), timesteps, states.to(dtype), added_cond_kwargs=added).sample
    return (predicted.float() - target).square().mean()


def masks_of(pipe: Any, choose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return a mask for each weight of the UNet."""
    return {name: choose(weight.detach()) for name, weight in pipe.unet.named_parameters()}


def smallest(share: float) -> Callable[[Tensor], Tensor]:
    """Return the rule that takes a share of each weight: written by sorting, unlike the code under test."""

    def choose(weight: Tensor) -> Tensor:
        flat = weight.float().abs().flatten()
        mask = torch.zeros(flat.shape, dtype=torch.bool)
        mask[flat.argsort(stable=True)[: round(share * flat.numel())]] = True
        return mask.view(weight.shape)

    return choose


class DenseProblem:
    """The UNet with all weights trained by ``torch.optim.AdamW``, of which only masked entries may move."""

    def __init__(self, pipe: Any, masks: Masks, *, rate: float, weight_decay: float = 0.01) -> None:
        unet = deepcopy(pipe.unet)
        self.pipe = type("Pipe", (), {"unet": unet})()
        self.weights: dict[str, nn.Parameter] = dict(unet.named_parameters())
        unet.requires_grad_(True)
        self.rate, self.weight_decay = rate, weight_decay
        self.start(masks)

    def start(self, masks: Masks) -> None:
        """Train on from here with other masks and new moments."""
        self.masks = masks
        self.fixed = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=self.rate, weight_decay=self.weight_decay
        )

    def step(self, seeds: Sequence[int], *, max_norm: float | None = None) -> None:
        """Make one step on the mean loss of some batches."""
        self.optimizer.zero_grad()
        for seed in seeds:
            (batch_loss(self.pipe, seed) / len(seeds)).backward()
        for name, weight in self.weights.items():
            # Weights of layers that are not used have none.
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad * self.masks[name]
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), max_norm)
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(torch.where(self.masks[name], weight, self.fixed[name]))

    def largest_difference(self, unet: nn.Module) -> float:
        """Return how far another UNet's weights lie from these."""
        return max(
            float((weight.detach() - self.weights[name].detach()).abs().max())
            for name, weight in unet.named_parameters()
        )
