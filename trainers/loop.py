"""The training loop that all methods share."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from studio.adapters.adapter import Adapter
from studio.data.batches import Samples
from studio.data.folder import PictureSet, read_folder
from studio.data.report import report
from studio.errors import OutputError, TrainingError
from studio.models.prompts import check_prompt
from studio.registry import TRAINERS
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.base import Trainer
from studio.trainers.borrow import borrowed
from studio.trainers.metadata import base_facts, run_facts
from studio.trainers.run import Job, Run, SampleFunction, step_path
from studio.trainers.runtime import (
    choose_device,
    choose_precision,
    make_accelerator,
    own_random_state,
    weight_dtype,
)
from studio.trainers.step import Latents, NoiseSchedule


def train(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    *,
    on_event: OnEvent = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
    sample: SampleFunction | None = None,
) -> Adapter:
    """Fit an adapter and return it; the base is given back bit for bit, also after an exception.

    Args:
        pipe: The base, in any number type and on any device.
        spec: What to do. ``spec.output`` itself is not written; pictures and adapters on the way lie beside
            it.
        on_event: Told ``report``, then ``progress`` (values ``loss``, ``loss_smoothed``, ``learning_rate``,
            ``steps_per_second`` and, if trained, ``text_encoder_learning_rate``), ``sample``, ``saved`` and
            ``message``.
        stop: Asked before each step; when true the adapter is returned as it is, its metadata with the steps
            done.
        sample: Draws the sample pictures.

    Raises:
        DataError: If the pictures cannot be used.
        OutputError: If a file that would be written on the way exists.
        TrainingError: If training cannot start, or diverges: the last good adapter is saved and named.
    """
    pictures = read_folder(spec)
    resolution = check_request(pipe, spec, pictures, can_sample=sample is not None)
    device = choose_device(spec, pipe)
    precision = choose_precision(spec, pipe, device)
    text = report(pictures, spec, resolution=resolution)
    on_event(
        Event(
            kind="report",
            message=f"{text}\nMethod: {spec.method} in {precision} on {device}",
            total=spec.steps,
        )
    )
    job = Job(
        pipe=pipe,
        spec=spec,
        facts=base_facts(pipe)
        | run_facts(spec, pictures=len(pictures.pictures), resolution=resolution, precision=precision),
        num_pictures=len(pictures.pictures),
        first_caption=pictures.pictures[0].caption,
        on_event=on_event,
        sample=sample,
    )
    trainer: Trainer = TRAINERS[spec.method]()
    with own_random_state(device), borrowed(pipe, device=device, dtype=weight_dtype(pipe, device, precision)):
        try:
            groups = trainer.prepare(pipe, spec)
            samples = Samples(
                pictures, spec, resolution=resolution, num_timesteps=NoiseSchedule(pipe).num_timesteps
            )
            latents = Latents(pipe, samples, device=device)
            accelerator = make_accelerator(
                device, precision, gradient_accumulation=spec.gradient_accumulation
            )
            return Run(job, trainer, groups, latents, accelerator).go(stop)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU's memory is not enough: {str(error).splitlines()[0]} "
                "Lower batch_size or resolution, or turn gradient_checkpointing on."
            ) from None
        finally:
            trainer.release()


def check_request(pipe: DiffusionPipeline, spec: TrainSpec, pictures: PictureSet, *, can_sample: bool) -> int:
    """Check what can be checked before any work and return the side of the training pictures in pixels.

    Raises:
        TrainingError: If base and specification do not fit together.
        OutputError: If a file that would be written on the way exists.
        UsageError: If a caption is too long for the text encoders.
    """
    channels, wanted = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != wanted:
        raise TrainingError(
            f"the UNet takes {channels} channels, its autoencoder gives {wanted}; inpainting bases cannot be "
            "trained. Choose another base."
        )
    factor: int = pipe.vae_scale_factor
    resolution: int = spec.resolution or pipe.unet.config.sample_size * factor
    if resolution % factor:
        raise TrainingError(f"resolution must be a multiple of {factor} for this base, got {resolution}.")
    for caption in dict.fromkeys(picture.caption for picture in pictures.pictures):
        check_prompt(pipe, caption)
    if spec.sample_every and not can_sample:
        raise TrainingError(
            "sample_every is set but there is nothing to draw samples with. Pass sample=, or set it to 0."
        )
    planned = (
        [step_path(spec.output, step) for step in range(spec.save_every, spec.steps, spec.save_every)]
        if spec.save_every
        else []
    )
    taken = [path for path in planned if path.exists()]
    if taken and not spec.overwrite:
        raise OutputError(f"{taken[0]} exists. Choose another output, or set overwrite (--overwrite).")
    return resolution
