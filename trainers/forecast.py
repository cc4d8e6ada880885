"""What the steps of a run will take, told before the first of them."""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from studio.adapters.resident import free_memory
from studio.data.captions import full_caption
from studio.trainers.base import Trainer
from studio.trainers.estimate import Estimate, FirstSteps, estimate, size
from studio.trainers.job import Job
from studio.trainers.pass_cost import encoding_pass, measured_speed, training_pass
from studio.trainers.runtime import DTYPES, own_random_state
from studio.trainers.shortage import ways_out
from studio.trainers.step import Batch, Batches

TOUCHED = 12
"""Times that a step reads or writes each trained number or one kept for it: clipping, keeping, AdamW."""
SHORT = 8
"""Steps of a run that is measured about as soon as its passes are estimated."""

log = logging.getLogger(__name__)


def look_ahead(
    step: nn.Module,
    job: Job,
    batches: Batches,
    *,
    trainer: Trainer,
    parameters: Sequence[nn.Parameter],
    averaged: bool,
    resting: Collection[str],
    precision: str,
    steps: int,
) -> FirstSteps:
    """Tell what a run will take, and return what measures its first steps beside it.

    Args:
        step: What gives the loss of a batch, in training mode.
        job: The run.
        batches: Its course.
        trainer: The method.
        parameters: What is trained.
        averaged: Whether a moving average is kept.
        resting: Networks that wait on the CPU while training.
        precision: accelerate's name of the number type of forward passes; "no" is the base's own.
        steps: That are left.
    """
    expected = estimate(
        job.pipe,
        parameters,
        aside=trainer.aside,
        optimizer=job.spec.optimizer,
        averaged=averaged,
        away=resting,
    )
    if job.processes.main and steps > SHORT:
        expected = _with_passes(expected, step, job, batches, resting=resting, precision=precision)
    device = next(job.pipe.unet.parameters()).device
    first_steps = FirstSteps(expected, device, steps=steps)
    job.tell(first_steps.expected())
    # What rests afterwards makes room on a GPU.
    free = free_memory(device)[0] + (expected.offloaded if device.type == "cuda" else 0)
    if expected.coming > free:
        job.tell(
            f"Warning: the steps are estimated to take {size(expected.coming)} more, and {size(free)} are "
            f"free on '{device}', so the memory may not be enough. {ways_out(job.spec, device)}"
        )
    return first_steps


def _with_passes(
    expected: Estimate,
    step: nn.Module,
    job: Job,
    batches: Batches,
    *,
    resting: Collection[str],
    precision: str,
) -> Estimate:
    """Return an estimate with what forward and backward passes take, or as it is where that fails."""
    spec, pipe = job.spec, job.pipe
    device, factor = next(pipe.unet.parameters()).device, pipe.vae_scale_factor
    rows: Counter[tuple[int, int]] = Counter()
    for course in batches.courses:
        width, height = course.largest
        rows[height // factor, width // factor] += spec.batch_size
    captions = [full_caption(picture) for course in batches.courses for picture in course.pictures]

    def encode(height: int, width: int) -> Tensor:
        pixels = torch.zeros(1, 3, height * factor, width * factor, device=device, dtype=pipe.vae.dtype)
        with torch.no_grad():
            mean: Tensor = pipe.vae.encode(pixels).latent_dist.mean
        return mean

    eager = torch.compiler.set_stance("force_eager") if spec.compile else contextlib.nullcontext()
    try:
        with own_random_state(device), eager:
            speed = measured_speed(device, _dtype(pipe.unet.dtype, precision))
            memory, seconds = 0, 0.0
            for latents, number in rows.items():

                def train(height: int, width: int, number: int = number) -> Tensor:
                    loss: Tensor = step(_blank(job, number, max(captions, key=len), height, width))
                    return loss

                held, took = training_pass(train, latents, parts=[step], speed=speed, device=device)
                memory, seconds = memory + held, seconds + took
            if "vae" not in resting:
                held, took = encoding_pass(encode, max(rows, key=math.prod), speed=speed)
                memory = max(memory, held)
                if spec.cache == "off" or not batches.pixels_recur:
                    seconds += took * rows.total()
            seconds = spec.gradient_accumulation * seconds + TOUCHED * expected.gradients / speed.traffic
    except Exception:
        # The run goes on without: what it takes is measured after its first steps.
        log.debug("the passes of this base cannot be told in advance", exc_info=True)
        return expected
    return replace(expected, activations=memory, seconds=seconds)


def _blank(job: Job, number: int, caption: str, height: int, width: int) -> Batch:
    """Return a batch of as many empty pictures, their height and width in latents."""
    unet = job.pipe.unet
    device = next(unet.parameters()).device
    latents = torch.zeros(number, unet.config.in_channels, height, width, device=device)
    return Batch(
        latents,
        latents,
        torch.zeros(number, device=device, dtype=torch.int64),
        (caption,) * number,
        torch.zeros(number, 6, device=device),
        torch.ones(number, device=device),
    )


def _dtype(own: torch.dtype, precision: str) -> torch.dtype:
    return next((dtype for name, dtype in DTYPES.items() if name == precision), own)
