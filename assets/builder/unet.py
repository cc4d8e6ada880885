"""Train the starter's UNet2DConditionModel on latents and text embeddings held in memory; resumable."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from studio.assets.builder.autoencoder import LATENT_CHANNELS
from studio.assets.builder.text_encoder import WIDTH

_CHANNELS = (64, 128, 160, 128)


def new_unet(*, latent_size: int, seed: int = 0) -> UNet2DConditionModel:
    """Return an untrained UNet with Stable Diffusion 1.x's block layout at reduced width."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=_CHANNELS,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


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


@dataclass(frozen=True)
class UNetTraining:
    """Settings of one run.

    Attributes:
        steps: Step to stop at, counted from the very first step of the model.
        decay: The last so many steps lower the learning rate to zero along a cosine.
        batch: Samples per step.
        rate: Highest learning rate.
        ema: Decay of the averaged weights.
        unconditional: Share of samples whose caption is replaced by the empty one.
        device: "cpu" or "cuda".
        compile: Whether to compile the UNet.
        seed: Seed of noise, timesteps and sample order.
    """

    steps: int
    decay: int = 0
    batch: int = 64
    rate: float = 1e-3
    ema: float = 0.998
    unconditional: float = 0.1
    device: str = "cpu"
    compile: bool = True
    seed: int = 0


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count]`` int64 timesteps, more of them where shapes are decided.

    With linear betas half of all timesteps are almost pure noise; 60 % of the draws fall into 60 to 519 (SNR
    23 to 0.07).
    """
    share = torch.rand(count, generator=generator)
    middle = torch.rand(count, generator=generator) < 0.6
    return torch.where(middle, 60 + 460 * share, 1000 * share).long()


def _rate(step: int, spec: UNetTraining) -> float:
    warm = min(1.0, (step + 1) / 200)
    left = spec.steps - step
    return (
        spec.rate * warm * (0.5 - 0.5 * math.cos(math.pi * left / spec.decay) if left < spec.decay else 1.0)
    )


@dataclass
class _Run:
    """What a run carries from step to step; its state file holds the same (not for publication)."""

    unet: UNet2DConditionModel
    average: AveragedModel
    optimizer: torch.optim.AdamW
    step: int = 0

    def resume(self, state: Path, device: torch.device) -> None:
        saved = torch.load(state, map_location=device, weights_only=True)
        self.unet.load_state_dict(saved["unet"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def write(self, state: Path) -> None:
        temporary = state.with_suffix(".tmp")
        torch.save(
            {
                "unet": self.unet.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            },
            temporary,
        )
        os.replace(temporary, state)

    def update(self, rate: float) -> None:
        """Take one optimizer step from the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.unet)
        self.step += 1


def _begin(unet: UNet2DConditionModel, spec: UNetTraining, device: torch.device) -> _Run:
    # Plain matrix products: on CPUs the fused attention's backward is several times slower in bf16.
    unet.set_attn_processor(AttnProcessor())
    unet.to(device=device, memory_format=torch.channels_last)
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(spec.ema))
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=spec.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    return _Run(unet, average, optimizer)


def _batch(
    latents: Tensor, embeddings: Tensor, empty: Tensor, signal: Tensor, *, spec: UNetTraining, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return noisy latents, timesteps, text and velocities of one step, the same for one seed and step.

    Args:
        latents: ``[N, C, h, w]`` of all samples.
        embeddings: ``[N, 77, WIDTH]`` of their captions.
        empty: ``[77, WIDTH]`` of the empty caption.
        signal: ``alphas_cumprod`` ``[1000]``, on the device of the run.
    """
    device = signal.device
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
    rows = torch.randint(len(latents), (spec.batch,), generator=generator)
    clean = latents[rows].to(device, torch.float32)
    text = embeddings[rows].to(device)
    drop = torch.rand(spec.batch, generator=generator).to(device) < spec.unconditional
    text = torch.where(drop[:, None, None], empty.to(device, text.dtype), text)
    timestep = draw_timesteps(spec.batch, generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    a = signal[timestep].sqrt()[:, None, None, None]
    b = (1 - signal[timestep]).sqrt()[:, None, None, None]
    return a * clean + b * noise, timestep, text, a * noise - b * clean


def train_unet(
    unet: UNet2DConditionModel,
    latents: Tensor,
    embeddings: Tensor,
    empty: Tensor,
    *,
    spec: UNetTraining,
    state: Path,
    save: Callable[[UNet2DConditionModel, int], None],
    every_seconds: float = 600,
) -> float:
    """Train and return the mean loss over the last hundred steps.

    Args:
        unet: Trained in place; where ``state`` exists the run goes on from there.
        latents: ``[N, C, h, w]``, scaled to about unit variance.
        embeddings: ``[N, 77, WIDTH]`` of the captions.
        empty: ``[77, WIDTH]`` of the empty caption.
        spec: Settings.
        state: File of weights, averaged weights, optimizer and step, rewritten at each save (not for
            publication).
        save: Called with the averaged model and the step at each save.
        every_seconds: Time between saves.
    """
    device = torch.device(spec.device)
    run = _begin(unet, spec, device)
    if state.exists():
        run.resume(state, device)
    # One compiled program for any number of threads: a run may be resumed with another.
    torch._inductor.config.cpp.dynamic_threads = True
    forward = torch.compile(unet) if spec.compile else unet
    signal = new_scheduler().alphas_cumprod.to(device)
    losses: list[float] = []
    last_save = time.monotonic()
    steps = range(run.step, spec.steps)
    for step in (progress := tqdm(steps, initial=run.step, total=spec.steps, desc="unet", mininterval=10)):
        noisy, timestep, text, velocity = _batch(latents, embeddings, empty, signal, spec=spec, step=step)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = forward(noisy, timestep, text).sample
        loss = F.mse_loss(predicted.float(), velocity)
        loss.backward()
        run.update(_rate(step, spec))
        losses = [*losses[-99:], loss.item()]
        if step % 20 == 0:
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
        if time.monotonic() - last_save > every_seconds:
            run.write(state)
            save(run.average.module, run.step)
            last_save = time.monotonic()
    run.write(state)
    save(run.average.module, run.step)
    return sum(losses) / max(1, len(losses))
