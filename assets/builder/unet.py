"""The starter's UNet2DConditionModel: its noise schedule, its loss, and its training on latents in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import PreTrainedModel

from studio.assets.builder.text_encoder import read
from studio.assets.builder.training import Machine, Schedule, Training, train

_UNCONDITIONAL = 0.1  # share of samples whose caption is left out


def new_unet(shape: Mapping[str, Any], *, seed: int = 0) -> UNet2DConditionModel:
    """Return an untrained UNet of a recipe's shape."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**shape)


def new_scheduler() -> DDIMScheduler:
    """Return the noise schedule of training: v-prediction with almost no signal at the last step.

    Flat backgrounds need a last step that is (nearly) pure noise, "Common Diffusion Noise Schedules and
    Sample Steps are Flawed", arXiv:2305.08891; the linear betas of DDPM end at a signal of 0.6 %, which every
    solver accepts.
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count]`` int64 timesteps, more of them where shapes are decided.

    With linear betas half of all timesteps are almost pure noise; 60 % of the draws fall into 60 to 519 (SNR
    23 to 0.07).
    """
    share = torch.rand(count, generator=generator, device=generator.device)
    middle = torch.rand(count, generator=generator, device=generator.device) < 0.6
    return torch.where(middle, 60 + 460 * share, 1000 * share).long()


@dataclass(frozen=True)
class Samples:
    """What a UNet learns from, all of it in memory.

    Attributes:
        latents: ``[N, C, h, w]``, scaled to about unit variance.
        time_ids: ``[N, 6]`` of SDXL.
        wording: ``[N]`` int64, the row of ``captions`` that words a sample.
        captions: ``[K, V, 77]`` token ids, V wordings of each of K pictures' contents.
        empty: ``[77]`` token ids of the empty caption.
    """

    latents: Tensor
    time_ids: Tensor
    wording: Tensor
    captions: Tensor
    empty: Tensor

    def to(self, device: torch.device) -> "Samples":
        """Return the same on a device."""
        parts = (self.latents, self.time_ids, self.wording, self.captions, self.empty)
        return Samples(*(part.to(device) for part in parts))


@torch.no_grad()
def condition(
    samples: Samples, rows: Tensor, encoders: Sequence[PreTrainedModel], generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the text states ``[B, 77, W]`` of samples and SDXL's added conditions (empty for one encoder).

    A tenth goes without caption. SDXL has two ways of that, the empty caption and zeros (what its pipeline
    takes where no negative prompt is given), so each of them gets half.
    """
    device = samples.captions.device
    draws = torch.rand(2, len(rows), generator=generator, device=device)
    variant = (draws[0] * samples.captions.shape[1]).long()
    dropped = draws[1] < _UNCONDITIONAL
    ids = samples.captions[samples.wording[rows], variant].long()
    states, pooled = read(encoders, torch.where(dropped[:, None], samples.empty.long(), ids))
    if pooled is None:
        return states, {}
    kept = (draws[1] >= _UNCONDITIONAL / 2).to(states.dtype)
    added = {"text_embeds": pooled * kept[:, None], "time_ids": samples.time_ids[rows]}
    return states * kept[:, None, None], added


def train_unet(
    unet: UNet2DConditionModel,
    samples: Samples,
    encoders: Sequence[PreTrainedModel],
    *,
    schedule: Schedule,
    machine: Machine,
    state: Path,
    batch: int,
    save: Callable[[Training], None] | None = None,
    seed: int = 0,
) -> Training:
    """Train the UNet in place to predict the velocity, arXiv:2202.00512.

    Args:
        unet: Trained in place.
        samples: What it learns from.
        encoders: The text encoders, fixed.
        schedule: Length and rates.
        machine: Device and deadline.
        state: State file.
        batch: Samples per step.
        save: Called at each save.
        seed: Of noise, timesteps, captions and sample order.
    """
    device = machine.torch_device
    if machine.device == "cpu":
        # Plain matrix products: on CPUs the fused attention's backward is several times slower in bf16.
        unet.set_attn_processor(AttnProcessor())
    unet.to(device, memory_format=machine.layout)
    encoders = [encoder.to(device).eval() for encoder in encoders]
    samples = samples.to(device)
    # One compiled program for any number of threads: a run may be resumed with another.
    torch._inductor.config.cpp.dynamic_threads = True
    forward = torch.compile(unet) if machine.compile else unet
    signal = new_scheduler().alphas_cumprod.to(device)

    def loss_at(step: int) -> Tensor:
        generator = machine.generator(seed, step)
        rows = torch.randint(len(samples.latents), (batch,), generator=generator, device=device)
        clean = samples.latents[rows].float()
        timestep = draw_timesteps(batch, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        a, b = (part[timestep].sqrt()[:, None, None, None] for part in (signal, 1 - signal))
        noisy = (a * clean + b * noise).contiguous(memory_format=machine.layout)
        with machine.autocast():
            states, added = condition(samples, rows, encoders, generator)
            predicted = forward(noisy, timestep, states, added_cond_kwargs=added or None).sample
        return F.mse_loss(predicted.float(), a * noise - b * clean)

    return train(unet, loss_at, schedule=schedule, machine=machine, state=state, name="unet", save=save)
