"""One run of the training loop, between attaching the method to the base and detaching it."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.data.batches import derived_seed
from studio.errors import OutputError, TrainingError
from studio.specs.events import Event
from studio.trainers.base import ParameterGroup, Trainer
from studio.trainers.checkpoint import Checkpoints, State, read
from studio.trainers.ema import Ema, mean_of, set_values
from studio.trainers.estimate import FirstSteps, estimate
from studio.trainers.evaluate import mean_loss
from studio.trainers.guard import Guard
from studio.trainers.inputs import make_prompts
from studio.trainers.job import Job
from studio.trainers.losses import Loss
from studio.trainers.runtime import rate_factor
from studio.trainers.step import Batches, Latents, TrainStep
from studio.trainers.validation import DRAWS, Validation

SMOOTHING = 0.95
PATIENCE = 30
"""Steps in a row that a loss scaler may skip before training counts as stuck."""


class Run:
    """One run between preparing and releasing the method.

    Args:
        job: What to work on.
        trainer: The method, prepared.
        groups: What it trains.
        batches: The course of batches.
        accelerator: Of this run alone.
        saved: State of the checkpoint to go on from, or None to start.
        held_out: Samples to measure the loss on, or None.
    """

    def __init__(
        self,
        job: Job,
        trainer: Trainer,
        groups: Sequence[ParameterGroup],
        batches: Batches,
        accelerator: Accelerator,
        saved: State | None = None,
        held_out: Latents | None = None,
    ) -> None:
        pipe, spec = job.pipe, job.spec
        self._job, self._trainer, self._groups, self._batches = job, trainer, groups, batches
        self._accelerator = accelerator
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._begun = self._done = self._skipped = 0
        self._smoothed = self._seconds = 0.0
        self._checkpoints = Checkpoints(job.folder.checkpoints, keep=spec.keep_checkpoints)
        self._checkpointed: int | None = None
        # Whether parameters and optimizer are as they are after ``_done`` steps.
        self._settled = True
        self._trained = [getattr(pipe, name) for name in dict.fromkeys(group.name for group in groups)]
        if spec.gradient_checkpointing:
            turn_checkpointing_on([pipe.unet, *self._trained])
        prompts = make_prompts(
            pipe,
            spec,
            batches.recurring_captions,
            trained=any(group.name.startswith("text_encoder") for group in groups),
            precision=str(accelerator.mixed_precision),
            tell=job.tell,
        )
        step = TrainStep(pipe, loss=Loss.of(spec), prompts=prompts)
        if saved is None:
            trainer.warm_start(lambda number: self._first_look(step, number))
        else:
            self._load_parameters(saved)
        self._ema = Ema(self._parameters, decay=spec.ema_decay) if spec.ema_decay else None
        self._validation: Validation | None = None
        if held_out is not None:
            # The plain error, to be compared between runs whatever they are trained with.
            plain = TrainStep(pipe, prompts=prompts)
            self._validation = Validation(lambda: self._measure(plain, held_out), patience=spec.patience)
        optimizer = trainer.optimizer(groups, name=spec.optimizer, weight_decay=spec.weight_decay)
        if saved is not None:
            self._load_progress(saved, optimizer)
        self._guard = Guard(self._parameters, steps=self._done)
        # A pure function of the step, so it needs no state of its own.
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: rate_factor(spec, done), last_epoch=self._done - 1
        )
        self._step, self._optimizer = accelerator.prepare(step, optimizer)
        self._estimate = estimate(
            pipe,
            self._parameters,
            aside=trainer.aside,
            optimizer=spec.optimizer,
            averaged=self._ema is not None,
        )
        device = next(pipe.unet.parameters()).device
        self._first_steps = FirstSteps(self._estimate, device, steps=spec.steps - self._done)

    def go(self, stop: Callable[[], bool]) -> Adapter:
        """Train to the end or until told to stop and return the adapter."""
        self._job.tell(f"{self._estimate}.")
        if self._begun:
            self._job.tell(f"Goes on after step {self._begun}.", step=self._begun)
        else:
            self._draw()
            self._validate()
        self._train_mode(True)
        self._first_steps.begin()
        try:
            stopped = self._train(stop)
            if not self._guard.healthy():
                self._diverged(self._done, "the adapter")
        except BaseException:
            self._rescue()
            raise
        finally:
            self._accelerator.end_training()
        if self._job.spec.average_last and not stopped:
            self._average(self._job.spec.average_last)
        return self._export()

    def _train(self, stop: Callable[[], bool]) -> bool:
        """Do the steps that are left; return whether it was told to stop before their end."""
        spec = self._job.spec
        while self._done < spec.steps:
            if stop():
                self._checkpoint()
                self._job.tell(f"Stopped after {self._done} of {spec.steps} steps.", step=self._done)
                return True
            self._advance()
            done = self._done
            if done == spec.steps or (spec.validate_every and done % spec.validate_every == 0):
                self._validate()
            if spec.checkpoint_every and (done % spec.checkpoint_every == 0 or done == spec.steps):
                self._checkpoint()
            if spec.save_every and done % spec.save_every == 0 and done < spec.steps:
                self._job.save(self._export(), self._job.folder.adapter(done), step=done)
                self._job.folder.prune_adapters(spec.keep_adapters)
            if spec.sample_every and (done % spec.sample_every == 0 or done == spec.steps):
                self._draw()
            if self._validation is not None and self._validation.exhausted:
                self._job.tell(
                    f"Stopped early after {done} of {spec.steps} steps: the validation loss has not fallen "
                    f"for {spec.patience} measurements.",
                    step=done,
                )
                return True
        return False

    def _advance(self) -> None:
        """Do one optimizer step and tell of it."""
        start = time.perf_counter()
        rates = [float(rate) for rate in self._rates.get_last_lr()]
        loss = self._optimizer_step(self._done)
        self._done += 1
        self._trainer.after_step(self._done)
        if self._ema is not None:
            self._ema.update()
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        self._settled = True
        took = time.perf_counter() - start
        self._seconds += took
        values = self._values(loss, rates)
        self._job.on_event(Event(kind="progress", step=self._done, total=self._job.spec.steps, values=values))
        self._accelerator.log(values, step=self._done)
        number = self._done - self._begun
        if number <= 2 and (measured := self._first_steps.end(number, took)):
            self._job.tell(measured)

    def _first_look(self, step: TrainStep, number: int) -> Tensor:
        """Return the loss of a batch before training."""
        size = self._job.spec.batch_size
        with self._accelerator.autocast():
            loss: Tensor = step(self._batches.batch(number * size, size))
        return loss

    def _optimizer_step(self, done: int) -> float:
        """Do one optimizer step and return its mean loss."""
        spec, accelerator = self._job.spec, self._accelerator
        losses: list[Tensor] = []
        for part in range(spec.gradient_accumulation):
            number = done * spec.gradient_accumulation + part
            # Dropout draws from the global state; seeded here it depends on nothing that ran before.
            torch.manual_seed(derived_seed(spec.seed, number, "dropout"))
            with accelerator.accumulate(self._step):
                loss = self._step(self._batches.batch(number * spec.batch_size, spec.batch_size))
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
        self._settled = False
        # Unscaling is allowed once, and accelerate's clipping would do it again.
        self._accelerator.unscale_gradients()
        self._trainer.before_clipping(done + 1)
        # After the method: kept values must be of the length that the parameters have from here on.
        self._guard.keep(done)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._job.spec.max_grad_norm)
        # In fp16 a loss scaler meets overflows by skipping the step, which is part of its work.
        if self._accelerator.scaler is None and not math.isfinite(float(norm)):
            self._diverged(done + 1, "the gradient")

    def _diverged(self, step: int, what: str) -> NoReturn:
        self._settled = False
        rescued = "Nothing was trained before it."
        if self._guard.steps:
            self._guard.restore()
            good = self._guard.steps
            path = self._job.folder.adapter(good, "last-good")
            adapter = self._job.described(self._trainer.export(), step=good)
            self._job.save(adapter, path, step=good)
            rescued = f"The adapter as it was after step {good} is saved as {path}."
        rate = self._job.spec.unet_learning_rate
        precision = " or set precision to bf16 or fp32" if self._accelerator.mixed_precision == "fp16" else ""
        raise TrainingError(
            f"{what} is no longer finite at step {step}. Lower learning_rate "
            f"(now {rate:g}, try {rate / 10:g}){precision}. {rescued}"
        )

    def _values(self, loss: float, rates: Sequence[float]) -> dict[str, float]:
        values = {
            "loss": loss,
            # Without the divisor the average would start near zero.
            "loss_smoothed": self._smoothed / (1 - SMOOTHING**self._done),
            "steps_per_second": (self._done - self._begun) / self._seconds,
        }
        for group, rate in zip(self._groups, rates, strict=True):
            # Of a component with several rates the first.
            name = "learning_rate" if group.name == "unet" else f"{group.name}_learning_rate"
            values.setdefault(name, rate)
        return values

    def _export(self) -> Adapter:
        """Return the adapter so far, of the averaged parameters where they are averaged."""
        if self._ema is None:
            adapter = self._trainer.export()
        else:
            with self._ema.applied():
                adapter = self._trainer.export()
            self._trainer.values_set()
        return self._job.described(adapter, step=self._done)

    def _measure(self, step: TrainStep, held_out: Latents) -> float:
        """Return the loss on what is held out, of the parameters that would be written."""
        averaged = contextlib.nullcontext() if self._ema is None else self._ema.applied()
        self._train_mode(False)
        with averaged, self._accelerator.autocast():
            self._trainer.values_set()
            number = max(DRAWS, len(held_out.samples.pictures))
            size, seed = self._job.spec.batch_size, self._job.spec.seed
            loss = mean_loss(step, held_out, num=number, batch_size=size, seed=seed)
        self._trainer.values_set()
        self._train_mode(True)
        return loss

    def _validate(self) -> None:
        if self._validation is None:
            return
        job = self._job
        loss, better = self._validation.look()
        text = f"Validation loss {loss:.4f} after step {self._done}{', the best so far' * better}."
        values = {"validation_loss": loss}
        job.on_event(
            Event(kind="message", message=text, step=self._done, total=job.spec.steps, values=values)
        )
        self._accelerator.log(values, step=self._done)
        if better and self._done:
            job.save(self._export(), job.folder.best_adapter, step=self._done)

    def _draw(self) -> None:
        job = self._job
        if not job.spec.sample_every or job.sample is None:
            return
        adapter = self._export() if self._done else None
        self._train_mode(False)
        with self._trainer.suspended():
            job.draw(adapter, step=self._done)
        self._train_mode(True)

    def _train_mode(self, on: bool) -> None:
        for part in self._trained:
            part.train(on)

    def _checkpoint(self) -> None:
        """Write what going on after this step needs, unless it is there."""
        if self._checkpointed == self._done:
            return
        if not self._guard.healthy():
            self._diverged(self._done, "the adapter")
        scaler = self._accelerator.scaler
        state = {
            "identity": self._job.identity,
            "done": self._done,
            "skipped": self._skipped,
            "smoothed": self._smoothed,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "method": self._trainer.state(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state(),
            "validation": None if self._validation is None else self._validation.state(),
        }
        path = self._checkpoints.save(self._done, state)
        self._checkpointed = self._done
        self._job.tell(f"Checkpoint after step {self._done}: {path}", step=self._done)

    def _rescue(self) -> None:
        """After an error, keep the steps that are done where they are good."""
        if self._settled and self._done > self._begun and self._guard.healthy():
            # What went wrong first is what the user must learn of.
            with contextlib.suppress(OutputError):
                self._checkpoint()

    def _load_parameters(self, saved: State) -> None:
        self._trainer.load_state(saved["method"])
        set_values(self._parameters, saved["parameters"])
        self._trainer.values_set()

    def _load_progress(self, saved: State, optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(saved["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved["scaler"])
        if self._ema is not None:
            self._ema.load_state(saved["ema"])
        if self._validation is not None:
            self._validation.load_state(saved["validation"])
        self._begun = self._done = self._checkpointed = saved["done"]
        self._skipped, self._smoothed = saved["skipped"], saved["smoothed"]

    def _average(self, number: int) -> None:
        """Give the parameters their mean over the last checkpoints that have as many of them."""
        states = [read(self._checkpoints.path(step))["parameters"] for step in self._checkpoints.steps()]
        shapes = [parameter.shape for parameter in self._parameters]
        alike = [state for state in states if [value.shape for value in state] == shapes][-number:]
        set_values(self._parameters, mean_of(alike))
        self._trainer.values_set()
        self._job.tell(f"The adapter is the mean of the last {len(alike)} checkpoints.", step=self._done)


def turn_checkpointing_on(parts: Sequence[Any]) -> None:
    """Have networks of diffusers and transformers trade time for memory in the backward pass."""
    for part in dict.fromkeys(parts):
        # transformers renamed it within version 5.
        names = (
            "enable_gradient_checkpointing",
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )
        next(getattr(part, name) for name in names if hasattr(part, name))()
