"""One forward pass of training: from latents, noise and captions to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from studio.data.batches import Sample, Samples
from studio.errors import TrainingError

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Entries of a scheduler's configuration that say how the model was trained."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        latents: Pictures in the autoencoder's space, scaled, ``[B, C, h, w]`` fp32.
        noise: Standard normal, of the same shape.
        timesteps: ``[B]`` int64.
        captions: One for each.
        size_conditions: SDXL's, ``[B, 6]``; other models do not read them.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    size_conditions: Tensor


class NoiseSchedule:
    """The base's noise schedule: noisy latents, what the UNet is to predict, and the loss's weights.

    Raises:
        TrainingError: If the base predicts neither the noise nor the velocity.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        # Solvers differ in how they step, not in the schedule that the model was trained with. `from_config`
        # would put DDPM's defaults in place of values that the solver's own configuration marks as defaults.
        given = pipe.scheduler.config
        self._scheduler = DDPMScheduler(**{key: given[key] for key in SCHEDULE_KEYS if key in given})
        self.prediction_type: str = self._scheduler.config.prediction_type
        self.num_timesteps: int = self._scheduler.config.num_train_timesteps
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise TrainingError(
                f"the base predicts '{self.prediction_type}', wanted 'epsilon' or 'v_prediction'. "
                "Choose another base."
            )

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents at their timesteps. DDPM, arXiv:2006.11239, Eq. 4."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the UNet is to predict: the noise, or the velocity of arXiv:2202.00512, Sec. 4."""
        if self.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the loss weights ``[B]`` fp32.

        ``min(SNR, gamma) / SNR`` for noise and ``min(SNR, gamma) / (SNR + 1)`` for velocity.
        Min-SNR, arXiv:2303.09556, Sec. 3.4.
        """
        kept = self._scheduler.alphas_cumprod.double()
        snr = kept / (1 - kept)
        if self.prediction_type == "epsilon":
            # Written so that a schedule that ends in pure noise (SNR 0) gets weight 1 there.
            weights = torch.clamp(gamma / snr, max=1.0)
        else:
            weights = torch.clamp(snr, max=gamma) / (snr + 1)
        # fp64 is for the CPU only: some devices have none.
        return weights.float().to(timesteps.device)[timesteps]


class Prompts:
    """Prompt embeddings, by the pipeline's own encoding.

    Args:
        pipe: Its text encoders are used as they are at each call.
        cache: Keep embeddings; for text encoders that are not trained.
    """

    def __init__(self, pipe: DiffusionPipeline, *, cache: bool) -> None:
        self._pipe = pipe
        self._cache = cache
        self._known: dict[str, tuple[Tensor, Tensor | None]] = {}
        # SDXL draws the empty prompt as zeros; samples without their caption must look the same.
        self._zero_empty = bool(pipe.config.get("force_zeros_for_empty_prompt", False))

    def __call__(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``[B, tokens, width]`` and, for SDXL, pooled ones ``[B, width]``."""
        if not self._cache:
            return self._encode(captions, device)
        for caption in dict.fromkeys(captions):
            if caption not in self._known:
                with torch.no_grad():
                    self._known[caption] = self._encode([caption], device)
        found = [self._known[caption] for caption in captions]
        pooled = [item[1] for item in found if item[1] is not None]
        return torch.cat([item[0] for item in found]), torch.cat(pooled) if pooled else None

    def _encode(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        encoded: tuple[Any, ...] = self._pipe.encode_prompt(
            prompt=list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        embeddings: Tensor = encoded[0]
        pooled: Tensor | None = encoded[2] if len(encoded) == 4 else None
        if self._zero_empty and "" in captions:
            keep = torch.tensor([caption != "" for caption in captions], device=embeddings.device)
            embeddings = embeddings * keep[:, None, None]
            pooled = None if pooled is None else pooled * keep[:, None]
        return embeddings, pooled


class Latents:
    """Latents and noise of samples; pictures with a fixed crop pass the autoencoder once.

    The distribution's mean and deviation are kept rather than a draw, so the cache changes no result.
    """

    def __init__(self, pipe: DiffusionPipeline, samples: Samples, *, device: torch.device) -> None:
        self._vae = pipe.vae
        self._samples = samples
        self._device = device
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        config = pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shape = (-1, 1, 1)
        self._mean = (
            torch.tensor(mean).view(shape) if mean is not None and std is not None else torch.zeros(())
        )
        self._scale = config.scaling_factor / (
            torch.tensor(std).view(shape) if mean is not None and std is not None else 1.0
        )

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return latents and noise of one sample, ``[C, h, w]`` fp32 on the CPU."""
        mean, std = self._moments(sample)
        posterior, noise = self._samples.noise(sample, mean.shape)
        return (mean + std * posterior - self._mean) * self._scale, noise

    def batch(self, first: int, size: int) -> Batch:
        """Return the batch of ``size`` samples from a global index on, on the device."""
        samples = [self._samples[index] for index in range(first, first + size)]
        latents, noise = zip(*(self(sample) for sample in samples), strict=True)
        return Batch(
            torch.stack(latents).to(self._device),
            torch.stack(noise).to(self._device),
            torch.tensor([sample.timestep for sample in samples], device=self._device),
            tuple(sample.caption for sample in samples),
            torch.tensor([self._samples.size_conditions(sample) for sample in samples], device=self._device),
        )

    def _moments(self, sample: Sample) -> tuple[Tensor, Tensor]:
        if sample.variant is not None and sample.variant in self._known:
            return self._known[sample.variant]
        pixels = self._samples.pixels(sample)[None].to(self._device, self._vae.dtype)
        with torch.no_grad():
            distribution = self._vae.encode(pixels).latent_dist
        moments = distribution.mean[0].float().cpu(), distribution.std[0].float().cpu()
        if sample.variant is not None:
            self._known[sample.variant] = moments
        return moments


class TrainStep(nn.Module):
    """The denoiser and text encoders of a pipeline with the loss of a batch as their forward.

    Args:
        pipe: The base, with whatever the training method attached to it.
        min_snr_gamma: Gamma of the loss weighting; None for the plain mean squared error.
        train_text_encoders: Whether gradients reach the text encoders; otherwise each caption is encoded
            once.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, min_snr_gamma: float | None, train_text_encoders: bool
    ) -> None:
        super().__init__()
        self.unet: Any = pipe.unet
        encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        self.text_encoders = nn.ModuleList(encoder for encoder in encoders if encoder is not None)
        self.schedule = NoiseSchedule(pipe)
        self._prompts = Prompts(pipe, cache=not train_text_encoders)
        self._gamma = min_snr_gamma

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss, a scalar in fp32."""
        noisy = self.schedule.noisy(batch.latents, batch.noise, batch.timesteps)
        embeddings, pooled = self._prompts(batch.captions, noisy.device)
        dtype = self.unet.dtype
        conditions = None
        if pooled is not None:
            conditions = {"text_embeds": pooled.to(dtype), "time_ids": batch.size_conditions.to(dtype)}
        predicted: Tensor = self.unet(
            noisy.to(dtype),
            batch.timesteps,
            embeddings.to(dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        losses = functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
        if self._gamma is not None:
            losses = losses * self.schedule.min_snr_weights(batch.timesteps, self._gamma)
        return losses.mean()
