"""The loss on fixed noise: a number that can be compared before and after training."""

import torch
from diffusers import DiffusionPipeline

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import components_of
from studio.data.batches import Samples, derived_seed
from studio.data.folder import PictureSet
from studio.specs.train import TrainSpec
from studio.trainers.borrow import borrowed
from studio.trainers.step import Batch, Latents, TrainStep


def evaluate_loss(
    pipe: DiffusionPipeline,
    pictures: PictureSet,
    adapter: Adapter | None = None,
    *,
    seed: int = 0,
    num: int = 32,
    resolution: int | None = None,
    batch_size: int = 4,
) -> float:
    """Return the mean squared error over ``num`` fixed draws of picture, noise and timestep.

    The pictures take turns and the timesteps lie evenly over the schedule, so the same call with and without
    an adapter differs by the adapter alone. The base is given back bit for bit.

    Args:
        pipe: The base.
        pictures: Those to evaluate on.
        adapter: Applied at weight 1.
        seed: Of the noise.
        num: Number of draws.
        resolution: Side of the pictures in pixels; the base's own by default.
        batch_size: Draws per forward pass; changes the speed only.
    """
    device = next(pipe.unet.parameters()).device
    side = resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    dtype = torch.float32 if device.type == "cpu" else pipe.unet.dtype
    spec = TrainSpec.model_validate({"data": pictures.folder, "output": "unused.safetensors", "seed": seed})
    with torch.no_grad(), borrowed(pipe, device=device, dtype=dtype):
        step = TrainStep(pipe, min_snr_gamma=None, train_text_encoders=False)
        total_timesteps = step.schedule.num_timesteps
        latents = Latents(
            pipe, Samples(pictures, spec, resolution=side, num_timesteps=total_timesteps), device=device
        )
        changes = (
            {name: [(change, 1.0)] for name, change in adapter.changes.items()} if adapter is not None else {}
        )
        with WeightBank(components_of(pipe), list(changes)) as bank:
            bank.apply(changes)
            total = 0.0
            for first in range(0, num, batch_size):
                size = min(batch_size, num - first)
                total += (
                    float(step(_even(latents.batch(first, size), first, num, total_timesteps, seed))) * size
                )
    return total / num


def _even(batch: Batch, first: int, num: int, total: int, seed: int) -> Batch:
    """Return the batch with timesteps spread evenly, in an order that does not follow the pictures'."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(derived_seed(seed, "evaluation")))
    places = order[first : first + len(batch.captions)]
    timesteps = ((places + 0.5) / num * total).long().to(batch.timesteps.device)
    return Batch(batch.latents, batch.noise, timesteps, batch.captions, batch.size_conditions)
