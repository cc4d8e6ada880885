"""One forward pass of training: from latents, noise and captions to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from studio.data.batches import Sample, Samples
from studio.data.buckets import Box
from studio.data.cache import Cache, Tensors, file_fingerprint
from studio.errors import TrainingError
from studio.trainers.losses import Loss
from studio.trainers.prompts import Prompts

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
PLAIN_LOSS = Loss()
"""The mean squared error, all timesteps alike."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        latents: Pictures in the autoencoder's space, scaled, ``[B, C, h, w]`` fp32.
        noise: Standard normal, of the same shape.
        timesteps: ``[B]`` int64.
        captions: One for each.
        size_conditions: SDXL's, ``[B, 6]``; other models do not read them.
        weights: Weight of each sample's loss in the sum that the loss is, ``[B]`` fp32.
        masks: Weight of each latent in its sample's loss, 0 to 1, ``[B, 1, h, w]`` fp32; None for all alike.
        beside: Samples of another size, whose loss is added.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    size_conditions: Tensor
    weights: Tensor
    masks: Tensor | None = None
    beside: "Batch | None" = None

    def with_prior(self, prior: "Batch", weight: float) -> "Batch":
        """Return this batch with one of class pictures: the sum of their losses, the prior's weighted.

        DreamBooth, arXiv:2208.12242, Eq. 2.
        """
        prior = replace(prior, weights=weight * prior.weights)
        if prior.latents.shape[1:] != self.latents.shape[1:]:
            return replace(self, beside=prior)
        masks = None
        if self.masks is not None or prior.masks is not None:
            masks = torch.cat([self._full_masks(), prior._full_masks()])
        return Batch(
            torch.cat([self.latents, prior.latents]),
            torch.cat([self.noise, prior.noise]),
            torch.cat([self.timesteps, prior.timesteps]),
            self.captions + prior.captions,
            torch.cat([self.size_conditions, prior.size_conditions]),
            torch.cat([self.weights, prior.weights]),
            masks,
        )

    def _full_masks(self) -> Tensor:
        return torch.ones_like(self.latents[:, :1]) if self.masks is None else self.masks


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

    def loss_weights(self, loss: Loss) -> Tensor | None:
        """Return what the loss of each timestep is multiplied by, fp32 ``[num_timesteps]``, or None.

        Raises:
            TrainingError: If the base's schedule and the weights do not fit together.
        """
        return loss.weights(self._scheduler.alphas_cumprod, prediction_type=self.prediction_type)


class Latents:
    """Latents and noise of samples; pictures with a fixed crop pass the autoencoder once.

    The distribution's mean and deviation are kept rather than a draw, so the cache changes no result.

    Args:
        pipe: Its autoencoder is used, which is to be held in fp32.
        samples: The course of samples.
        device: Where batches are put.
        cache: Keeps what recurs; None to encode every time.
    """

    def __init__(
        self, pipe: DiffusionPipeline, samples: Samples, *, device: torch.device, cache: Cache | None
    ) -> None:
        self.samples = samples
        self._vae = pipe.vae
        self._device = device
        self._cache = cache
        self._known_masks: dict[tuple[int, Box, bool], Tensor | None] = {}
        # Files are read again and again but hashed once.
        self._fingerprint = lru_cache(maxsize=None)(file_fingerprint)
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
        posterior, noise = self.samples.noise(sample, mean.shape)
        return (mean + std * posterior - self._mean) * self._scale, noise

    def encode(self, steps: range) -> None:
        """Encode the pictures of optimizer steps ahead of their use, those that recur and each once."""
        group = self.samples.group
        course = (self.samples[index] for index in range(steps.start * group, steps.stop * group))
        found = {(own.picture, own.box, own.size, own.flip): own for own in course if own.recurs}
        for sample in found.values():
            self._moments(sample)

    def batch(self, first: int, size: int) -> Batch:
        """Return the batch of ``size`` samples from a global index on, on the device."""
        return self.collate([self.samples[index] for index in range(first, first + size)])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Return samples of one size as a batch on the device."""
        latents, noise = zip(*(self(sample) for sample in samples), strict=True)
        return Batch(
            torch.stack(latents).to(self._device),
            torch.stack(noise).to(self._device),
            torch.tensor([sample.timestep for sample in samples], device=self._device),
            tuple(sample.caption for sample in samples),
            torch.tensor([self.samples.size_conditions(sample) for sample in samples], device=self._device),
            torch.full((len(samples),), 1 / len(samples), device=self._device),
            self._masks(samples, latents[0].shape[-2:]),
        )

    def _masks(self, samples: Sequence[Sample], shape: Sequence[int]) -> Tensor | None:
        masks = [self._mask(sample, shape) for sample in samples]
        if all(mask is None for mask in masks):
            return None
        full = torch.ones(1, *shape)
        return torch.stack([full if mask is None else mask for mask in masks]).to(self._device)

    def _mask(self, sample: Sample, shape: Sequence[int]) -> Tensor | None:
        # A few kilobytes for each picture, so kept whatever the cache is.
        key = (sample.picture, sample.box, sample.flip)
        if key in self._known_masks:
            return self._known_masks[key]
        mask = self.samples.mask(sample, shape)
        if sample.recurs:
            self._known_masks[key] = mask
        return mask

    def _moments(self, sample: Sample) -> tuple[Tensor, Tensor]:
        def make() -> Tensors:
            assert self._vae.dtype == torch.float32
            pixels = self.samples.pixels(sample)[None].to(self._device)
            # In 16 bits SDXL's autoencoder overflows.
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                distribution = self._vae.encode(pixels).latent_dist
            return {"mean": distribution.mean[0].float().cpu(), "std": distribution.std[0].float().cpu()}

        if self._cache is None or not sample.recurs:
            found = make()
        else:
            content = self._fingerprint(self.samples.pictures[sample.picture].path)
            facts = {"content": content, "box": sample.box, "size": sample.size, "flip": sample.flip}
            found = self._cache.get(facts, make)
        return found["mean"], found["std"]


class Batches:
    """The course of batches of one run, those of class pictures beside the user's.

    Args:
        subject: The user's pictures.
        prior: Class pictures, or None.
        prior_weight: Of the loss on class pictures.
    """

    def __init__(self, subject: Latents, prior: Latents | None, *, prior_weight: float) -> None:
        self._subject, self._prior, self._prior_weight = subject, prior, prior_weight
        self._parts = [subject] if prior is None else [subject, prior]

    @property
    def courses(self) -> list[Samples]:
        """The courses of samples, the user's and that of class pictures."""
        return [part.samples for part in self._parts]

    @property
    def recurring_captions(self) -> frozenset[str]:
        """The captions that come again in every epoch."""
        return frozenset().union(*(part.samples.recurring_captions for part in self._parts))

    @property
    def captions_vary(self) -> bool:
        """Whether a picture's caption differs from sample to sample, caption dropout apart."""
        return any(part.samples.captions_vary for part in self._parts)

    @property
    def pixels_recur(self) -> bool:
        """Whether every epoch shows the same pixels, mirrored or not."""
        return all(part.samples.pixels_recur for part in self._parts)

    def encode(self, steps: range) -> None:
        """Encode the pictures of optimizer steps ahead of their use, those that recur and each once."""
        for part in self._parts:
            part.encode(steps)

    def batch(self, first: int, size: int) -> Batch:
        """Return ``size`` samples of each kind from a global index on."""
        batch = self._subject.batch(first, size)
        if self._prior is None:
            return batch
        return batch.with_prior(self._prior.batch(first, size), self._prior_weight)


class TrainStep(nn.Module):
    """The denoiser and text encoders of a pipeline with the loss of a batch as their forward.

    Args:
        pipe: The base, with whatever the training method attached to it.
        loss: Of the single numbers, and its weights.
        prompts: Encodes the captions.

    Raises:
        TrainingError: If base and loss do not fit together.
    """

    def __init__(self, pipe: DiffusionPipeline, *, loss: Loss = PLAIN_LOSS, prompts: Prompts) -> None:
        super().__init__()
        self.unet: Any = pipe.unet
        encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        self.text_encoders = nn.ModuleList(encoder for encoder in encoders if encoder is not None)
        self.schedule = NoiseSchedule(pipe)
        self._prompts = prompts
        self._loss_of = loss
        self._weights = self.schedule.loss_weights(loss)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss, a scalar in fp32."""
        loss = self._loss(batch)
        return loss if batch.beside is None else loss + self._loss(batch.beside)

    def _loss(self, batch: Batch) -> Tensor:
        noisy = self.schedule.noisy(batch.latents, batch.noise, batch.timesteps)
        embeddings, pooled, mask = self._prompts(batch.captions, noisy.device)
        dtype = self.unet.dtype
        conditions = None
        if pooled is not None:
            conditions = {"text_embeds": pooled.to(dtype), "time_ids": batch.size_conditions.to(dtype)}
        predicted: Tensor = self.unet(
            noisy.to(dtype),
            batch.timesteps,
            embeddings.to(dtype),
            encoder_attention_mask=mask,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        errors = self._loss_of.errors(predicted.float(), target.float())
        losses = masked_mean(errors, batch.masks)
        if self._weights is not None:
            self._weights = self._weights.to(batch.timesteps.device)
            losses = losses * self._weights[batch.timesteps]
        return (losses * batch.weights).sum()


def masked_mean(errors: Tensor, masks: Tensor | None) -> Tensor:
    """Return the mean of each sample's errors, weighted by its mask, ``[B]``.

    Divided by the mask's area, so that a small mask counts as much as a large one; 0 where the crop holds no
    part of the mask.

    Args:
        errors: ``[B, C, h, w]`` fp32.
        masks: ``[B, 1, h, w]``, 0 to 1, or None for all alike.
    """
    if masks is None:
        return errors.flatten(1).mean(1)
    area = errors.shape[1] * masks.flatten(1).sum(1)
    weighted: Tensor = (errors * masks).flatten(1).sum(1)
    return weighted / torch.where(area > 0, area, 1.0)
