"""The loss on fixed noise: a number that can be compared before and after training."""

from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import components_of
from studio.data.batches import Sample, Samples, derived_seed
from studio.data.buckets import Buckets, Size
from studio.data.cache import MemoryCache
from studio.data.picture import PictureSet
from studio.trainers.borrow import borrowed
from studio.trainers.processes import ALONE, Processes
from studio.trainers.prompts import Prompts
from studio.trainers.step import Latents, TrainStep


def evaluate_loss(
    pipe: DiffusionPipeline,
    pictures: PictureSet,
    adapter: Adapter | None = None,
    *,
    seed: int = 0,
    num: int = 32,
    resolution: int | None = None,
    buckets: Buckets | None = None,
    batch_size: int = 4,
) -> float:
    """Return the mean squared error over ``num`` fixed draws of picture, noise and timestep.

    The pictures take turns and the timesteps lie evenly over the schedule, so the same call with and without
    an adapter differs by the adapter alone. Nothing else of the pictures' treatment is left to chance. The
    base is given back bit for bit.

    Args:
        pipe: The base.
        pictures: Those to evaluate on.
        adapter: Applied at weight 1.
        seed: Of the noise.
        num: Number of draws.
        resolution: Side of the pictures in pixels; the base's own by default.
        buckets: Sizes of the pictures, in place of the square of that side.
        batch_size: Draws per forward pass; changes the speed only.

    Raises:
        DataError: If a picture fits no bucket.
    """
    device = next(pipe.unet.parameters()).device
    side = resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    dtype = torch.float32 if device.type == "cpu" else pipe.unet.dtype
    with borrowed(pipe, device=device, dtype=dtype):
        step = TrainStep(pipe, prompts=Prompts(pipe, cache=MemoryCache()))
        samples = Samples(
            pictures.fixed(),
            seed=seed,
            buckets=buckets or Buckets.square(side),
            num_timesteps=step.schedule.num_timesteps,
        )
        latents = Latents(pipe, samples, device=device, cache=MemoryCache())
        changes = (
            {name: [(change, 1.0)] for name, change in adapter.changes.items()} if adapter is not None else {}
        )
        with WeightBank(components_of(pipe), list(changes)) as bank:
            bank.apply(changes)
            return mean_loss(step, latents, num=num, batch_size=batch_size, seed=seed)


@torch.no_grad()
def mean_loss(
    step: TrainStep,
    latents: Latents,
    *,
    num: int,
    batch_size: int,
    seed: int,
    processes: Processes = ALONE,
) -> float:
    """Return the mean loss over ``num`` draws whose timesteps lie evenly over the schedule.

    It may be asked for within a training run: nothing is changed, and no random number is drawn that the run
    would draw.

    Args:
        step: Gives the loss of a batch.
        latents: Of samples that are fixed.
        num: Number of draws.
        batch_size: Draws per forward pass; changes the speed only.
        seed: Of the order of the timesteps, which does not follow the pictures'.
        processes: Share the forward passes; all get the mean.
    """
    total = step.schedule.num_timesteps
    order = torch.randperm(num, generator=torch.Generator().manual_seed(derived_seed(seed, "evaluation")))
    timesteps = ((order + 0.5) / num * total).long().tolist()
    draws = [replace(latents.samples[index], timestep=timesteps[index]) for index in range(num)]
    # Only pictures of one size go through the UNet together.
    by_size: dict[Size, list[Sample]] = {}
    for draw in draws:
        by_size.setdefault(draw.size, []).append(draw)
    parts = [
        alike[first : first + batch_size]
        for alike in by_size.values()
        for first in range(0, len(alike), batch_size)
    ]
    own = parts[processes.index :: processes.count]
    return processes.total(sum(float(step(latents.collate(part))) * len(part) for part in own)) / num
