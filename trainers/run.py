"""One run of the training loop, between attaching the method to the base and detaching it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.files import save_adapter
from studio.data.batches import derived_seed
from studio.errors import TrainingError
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer
from studio.trainers.borrow import converted
from studio.trainers.guard import Guard
from studio.trainers.metadata import progress_facts
from studio.trainers.runtime import rate_factor
from studio.trainers.step import Latents, TrainStep

SampleFunction = Callable[[DiffusionPipeline, Adapter | None, str, int], Image.Image]
"""Draws one picture: pipeline (the plain base), adapter so far (None before the first step), prompt, seed."""

SMOOTHING = 0.95
PATIENCE = 30
"""Steps in a row that a loss scaler may skip before training counts as stuck."""


@dataclass(frozen=True)
class Job:
    """What a run works on and whom it tells.

    Attributes:
        pipe: The base, lent.
        spec: What to do.
        facts: Metadata of every adapter that it writes.
        num_pictures: How many there are.
        first_caption: Prompt of the samples where none is given.
        on_event: Told what happens.
        sample: Draws the sample pictures.
    """

    pipe: DiffusionPipeline
    spec: TrainSpec
    facts: Mapping[str, str]
    num_pictures: int
    first_caption: str
    on_event: OnEvent
    sample: SampleFunction | None


class Run:
    """One run between preparing and releasing the method."""

    def __init__(
        self,
        job: Job,
        trainer: Trainer,
        groups: Sequence[ParameterGroup],
        latents: Latents,
        accelerator: Accelerator,
    ) -> None:
        pipe, spec = job.pipe, job.spec
        self._job, self._trainer, self._groups, self._latents = job, trainer, groups, latents
        self._accelerator = accelerator
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._guard = Guard(self._parameters)
        self._skipped = 0
        self._smoothed = 0.0
        self._trained = [getattr(pipe, group.name) for group in groups]
        text = any(group.name.startswith("text_encoder") for group in groups)
        if spec.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            for part in self._trained:
                if part is not pipe.unet:
                    # transformers renamed it within version 5.
                    (
                        getattr(part, "activation_checkpointing_enable", None)
                        or part.gradient_checkpointing_enable
                    )()
        step = TrainStep(pipe, min_snr_gamma=spec.min_snr_gamma, train_text_encoders=text)
        optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups],
            weight_decay=spec.weight_decay,
        )
        self._rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_factor(spec, done))
        self._step, self._optimizer = accelerator.prepare(step, optimizer)

    def go(self, stop: Callable[[], bool]) -> Adapter:
        """Train to the end or until told to stop and return the adapter."""
        spec, on_event = self._job.spec, self._job.on_event
        self._draw(0)
        self._train_mode(True)
        done, seconds = 0, 0.0
        while done < spec.steps:
            if stop():
                on_event(
                    Event(
                        kind="message",
                        message=f"Stopped after {done} of {spec.steps} steps.",
                        step=done,
                        total=spec.steps,
                    )
                )
                break
            start = time.perf_counter()
            rates = [float(rate) for rate in self._rates.get_last_lr()]
            loss = self._optimizer_step(done)
            done += 1
            self._trainer.after_step(done)
            seconds += time.perf_counter() - start
            on_event(
                Event(
                    kind="progress",
                    step=done,
                    total=spec.steps,
                    values=self._values(loss, rates, done, seconds),
                )
            )
            if spec.save_every and done % spec.save_every == 0 and done < spec.steps:
                self._save(done, step_path(spec.output, done), overwrite=spec.overwrite)
            if spec.sample_every and (done % spec.sample_every == 0 or done == spec.steps):
                self._draw(done)
        if not self._guard.healthy():
            self._diverged(done, "the adapter")
        return self._export(done)

    def _optimizer_step(self, done: int) -> float:
        """Do one optimizer step and return its mean loss."""
        spec, accelerator = self._job.spec, self._accelerator
        losses: list[Tensor] = []
        for part in range(spec.gradient_accumulation):
            number = done * spec.gradient_accumulation + part
            # Dropout draws from the global state; seeded here it depends on nothing that ran before.
            torch.manual_seed(derived_seed(spec.seed, number, "dropout"))
            with accelerator.accumulate(self._step):
                loss = self._step(self._latents.batch(number * spec.batch_size, spec.batch_size))
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    mean = float(torch.stack(losses).mean())
                    self._check(done, mean)
                self._optimizer.step()
                self._optimizer.zero_grad()
        self._rates.step()
        self._skipped = self._skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= PATIENCE:
            self._diverged(done + 1, "the gradient")
        return mean

    def _check(self, done: int, loss: float) -> None:
        """Clip, and stop training that has broken down before it reaches the parameters."""
        if not math.isfinite(loss):
            self._diverged(done + 1, "the loss")
        self._guard.keep(done)
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._job.spec.max_grad_norm)
        # In fp16 a loss scaler meets overflows by skipping the step, which is part of its work.
        if self._accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            self._diverged(done + 1, "the gradient")

    def _diverged(self, step: int, what: str) -> NoReturn:
        spec = self._job.spec
        rescued = "Nothing was trained before it."
        if self._guard.steps:
            self._guard.restore()
            path = step_path(spec.output, self._guard.steps, "last-good")
            self._save(self._guard.steps, path, overwrite=True)
            rescued = f"The adapter as it was after step {self._guard.steps} is saved as {path}."
        precision = " or set precision to bf16 or fp32" if self._accelerator.mixed_precision == "fp16" else ""
        raise TrainingError(
            f"{what} is no longer finite at step {step}. Lower learning_rate "
            f"(now {spec.learning_rate:g}, try {spec.learning_rate / 10:g}){precision}. {rescued}"
        )

    def _values(self, loss: float, rates: Sequence[float], done: int, seconds: float) -> dict[str, float]:
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        values = {
            "loss": loss,
            # Without the divisor the average would start near zero.
            "loss_smoothed": self._smoothed / (1 - SMOOTHING**done),
            "steps_per_second": done / seconds,
        }
        for group, rate in zip(self._groups, rates, strict=True):
            values["learning_rate" if group.name == "unet" else f"{group.name}_learning_rate"] = rate
        return values

    def _export(self, done: int) -> Adapter:
        job = self._job
        adapter = self._trainer.export()
        progress = progress_facts(job.spec, steps=done, pictures=job.num_pictures)
        return replace(
            adapter, name=job.spec.output.stem, metadata={**adapter.metadata, **job.facts, **progress}
        )

    def _save(self, done: int, path: Path, *, overwrite: bool) -> None:
        written = save_adapter(self._export(done), path, format=self._job.spec.format, overwrite=overwrite)
        self._job.on_event(Event(kind="saved", step=done, total=self._job.spec.steps, path=written))

    def _draw(self, done: int) -> None:
        """Draw the sample pictures on the plain base with the adapter so far, as who has its file would."""
        job, spec = self._job, self._job.spec
        if not spec.sample_every or job.sample is None:
            return
        adapter = self._export(done) if done else None
        self._train_mode(False)
        # Pipelines expect the autoencoder in the UNet's number type.
        with self._trainer.suspended(), converted(job.pipe.vae, job.pipe.unet.dtype):
            for number, prompt in enumerate(spec.sample_prompts or (spec.prompt or job.first_caption,)):
                image = job.sample(job.pipe, adapter, prompt, spec.seed)
                path = spec.output.with_name(f"{spec.output.stem}-samples") / f"{done:06d}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                job.on_event(Event(kind="sample", message=prompt, step=done, total=spec.steps, path=path))
        self._train_mode(True)

    def _train_mode(self, on: bool) -> None:
        for part in self._trained:
            part.train(on)


def step_path(output: Path, step: int, what: str = "step") -> Path:
    """Return the file of an adapter on the way to ``output``."""
    return output.with_name(f"{output.stem}-{what}-{step:06d}{output.suffix}")
