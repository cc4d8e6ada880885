"""One run of the training loop, between attaching the method to the base and detaching it."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.data.batches import derived_seed
from studio.errors import OutputError, TrainingError, memory_shortage
from studio.specs.events import Event
from studio.trainers.base import ParameterGroup, Trainer
from studio.trainers.checkpoint import Checkpoints, State, read
from studio.trainers.course import Course
from studio.trainers.ema import Ema, mean_of, set_values
from studio.trainers.evaluate import mean_loss
from studio.trainers.forecast import look_ahead
from studio.trainers.guard import Guard
from studio.trainers.inputs import make_prompts
from studio.trainers.job import Job
from studio.trainers.losses import Loss
from studio.trainers.offload import Encoders
from studio.trainers.optimizers import optimizer_of
from studio.trainers.prompts import Prompts
from studio.trainers.runtime import rate_factor, seed_random_state, turn_checkpointing_on
from studio.trainers.step import Batch, Batches, Latents, TrainStep
from studio.trainers.validation import DRAWS, Validation

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
        spec = job.spec
        self._job, self._trainer, self._groups, self._batches = job, trainer, groups, batches
        self._accelerator, self._processes = accelerator, job.processes
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._begun = self._done = self._skipped = 0
        self._course = Course(groups)
        self._checkpoints = Checkpoints(
            job.folder.checkpoints, keep=spec.keep_checkpoints, every=spec.checkpoint_every
        )
        self._checkpointed: int | None = None
        self._draws = bool(spec.sample_every) and job.sample is not None and job.processes.main
        # Whether parameters and optimizer are as they are after ``_done`` steps.
        self._settled = True
        self._trained = [getattr(job.pipe, name) for name in dict.fromkeys(group.name for group in groups)]
        if spec.gradient_checkpointing:
            turn_checkpointing_on([job.pipe.unet, *self._trained])
        prompts = self._prompts()
        self._encoders = Encoders(job.pipe, batches, prompts, offload=spec.offload_encoders)
        step = TrainStep(job.pipe, loss=Loss.of(spec), prompts=prompts)
        self._set_start(step, saved)
        self._ema = Ema(self._parameters, decay=spec.ema_decay) if spec.ema_decay else None
        # The plain error, to be compared between runs whatever they are trained with.
        self._held_out = None if held_out is None else (TrainStep(job.pipe, prompts=prompts), held_out)
        self._validation = Validation(patience=spec.patience)
        self._prepare(step, saved)
        self._guard = Guard(self._parameters, steps=self._done)

    def _prompts(self) -> Prompts:
        job = self._job
        return make_prompts(
            job.pipe,
            job.spec,
            self._batches.recurring_captions,
            trained=any(group.name.startswith("text_encoder") for group in self._groups),
            tell=job.tell,
        )

    def _set_start(self, step: TrainStep, saved: State | None) -> None:
        """Give the parameters the values that they start or go on from."""
        if saved is None:
            self._trainer.warm_start(lambda number: self._first_look(step, number), self._processes)
        else:
            self._trainer.load_state(saved["method"])
            set_values(self._parameters, saved["parameters"])
        self._processes.equalize(self._parameters)
        self._trainer.values_set()

    def _prepare(self, step: TrainStep, saved: State | None) -> None:
        """Make what takes the steps, as it is after those that are done."""
        spec, accelerator = self._job.spec, self._accelerator
        optimizer = optimizer_of(self._trainer, self._groups, spec)
        if saved is not None:
            self._load_progress(saved, optimizer)
        # A pure function of the step, so it needs no state of its own.
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: rate_factor(spec, done), last_epoch=self._done - 1
        )
        # Without accelerate's DDP, which would write to the base's frozen weights, and which knows nothing of
        # parameters that are not the networks' own, such as SaRA's: gradients are averaged below.
        self._step = accelerator.prepare_model(step, evaluation_mode=True)
        self._optimizer = accelerator.prepare_optimizer(optimizer)

    def go(self, stop: Callable[[], bool]) -> Adapter:
        """Train to the end or until told to stop and return the adapter."""
        self._train_mode(True)
        self._first_steps = look_ahead(
            self._step,
            self._job,
            self._batches,
            trainer=self._trainer,
            parameters=self._parameters,
            averaged=self._ema is not None,
            resting=self._encoders.resting,
            precision=str(self._accelerator.mixed_precision),
            steps=self._job.spec.steps - self._done,
        )
        if self._begun:
            self._job.tell(f"Goes on after step {self._begun}.", step=self._begun)
        else:
            self._draw()
            self._validate()
        self._encoders.rest(range(self._done, self._job.spec.steps), self._job.tell)
        self._first_steps.begin()
        try:
            stopped = self._train(stop)
            if not self._guard.healthy():
                self._diverged(self._done, "the adapter")
        except BaseException:
            self._rescue()
            raise
        finally:
            # accelerate's own ending would also part the processes, which may have more runs before them.
            for tracker in self._accelerator.trackers:
                tracker.finish()
        if self._job.spec.average_last and not stopped:
            self._average(self._job.spec.average_last)
        return self._export()

    def _train(self, stop: Callable[[], bool]) -> bool:
        """Do the steps that are left; return whether it was told to stop before their end."""
        spec = self._job.spec
        while self._done < spec.steps:
            if self._validation.exhausted:
                self._job.tell(self._validation.ending(self._done, spec.steps), step=self._done)
                return True
            if self._processes.any(stop()):
                self._checkpoint()
                self._job.tell(
                    f"Stopped after {self._done} of {spec.steps} steps; to go on: resume (--resume).",
                    step=self._done,
                )
                return True
            self._advance()
            done = self._done
            if done == spec.steps or (spec.validate_every and done % spec.validate_every == 0):
                self._validate()
            if spec.checkpoint_every and (done % spec.checkpoint_every == 0 or done == spec.steps):
                self._checkpoint()
            if spec.save_every and done % spec.save_every == 0 and done < spec.steps:
                self._save(self._job.folder.adapter(done))
            if spec.sample_every and (done % spec.sample_every == 0 or done == spec.steps):
                self._draw()
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
        self._settled = True
        took = time.perf_counter() - start
        values = self._course.advance(loss, took, rates, done=self._done)
        self._job.on_event(Event(kind="progress", step=self._done, total=self._job.spec.steps, values=values))
        self._accelerator.log(values, step=self._done)
        number = self._done - self._begun
        if number <= 2 and (measured := self._first_steps.end(number, took)):
            self._job.tell(measured)

    def _first_look(self, step: TrainStep, number: int) -> Tensor:
        """Return the loss of this process's share of a batch before training."""
        with self._accelerator.autocast():
            loss: Tensor = step(self._batch(self._place(number)))
        return loss

    def _place(self, number: int) -> int:
        """Return the place of a forward pass of this process among those of all.

        So what a step sees, and drops out, is the same in several processes as with as many accumulated.

        Args:
            number: Forward passes that this process has done before.
        """
        return number * self._processes.count + self._processes.index

    def _batch(self, place: int) -> Batch:
        size = self._job.spec.batch_size
        return self._batches.batch(place * size, size)

    def _optimizer_step(self, done: int) -> float:
        """Do one optimizer step and return its mean loss."""
        spec, accelerator = self._job.spec, self._accelerator
        losses: list[Tensor] = []
        for part in range(spec.gradient_accumulation):
            place = self._place(done * spec.gradient_accumulation + part)
            # Dropout draws from the global state; seeded here it depends on nothing that ran before.
            seed_random_state(accelerator.device, derived_seed(spec.seed, place, "dropout"))
            with accelerator.accumulate(self._step):
                loss = self._step(self._batch(place))
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    mean = self._processes.mean(float(torch.stack(losses).mean()))
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
        self._processes.average_gradients(self._parameters)
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
            if self._processes.main:
                adapter = self._job.described(self._trainer.export(), step=good)
                self._job.save(adapter, path, step=good)
            rescued = f"The adapter as it was after step {good} is saved as {path}."
        rate = self._job.spec.unet_learning_rate
        precision = " or set precision to bf16 or fp32" if self._accelerator.mixed_precision == "fp16" else ""
        raise TrainingError(
            f"{what} is no longer finite at step {step}. Lower learning_rate "
            f"(now {rate:g}, try {rate / 10:g}){precision}. {rescued}"
        )

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
        with self._encoders.awake(), averaged, self._accelerator.autocast():
            self._trainer.values_set()
            number = max(DRAWS, len(held_out.samples.pictures))
            size, seed = self._job.spec.batch_size, self._job.spec.seed
            loss = mean_loss(
                step, held_out, num=number, batch_size=size, seed=seed, processes=self._processes
            )
        self._trainer.values_set()
        self._train_mode(True)
        return loss

    def _validate(self) -> None:
        if self._held_out is None:
            return
        job = self._job
        loss = self._measure(*self._held_out)
        better = self._validation.better(loss)
        text = f"Validation loss {loss:.4f} after step {self._done}{', the best so far' * better}."
        values = {"validation_loss": loss}
        job.on_event(
            Event(kind="message", message=text, step=self._done, total=job.spec.steps, values=values)
        )
        self._accelerator.log(values, step=self._done)
        if better and self._done:
            self._save(job.folder.best_adapter)

    def _save(self, path: Path) -> None:
        """Write the adapter so far; those of earlier steps that are not to be kept make room."""
        if self._processes.main:
            self._job.save(self._export(), path, step=self._done)
            self._job.folder.prune_adapters(self._job.spec.keep_adapters)

    def _draw(self) -> None:
        """Draw the samples, none any more once the memory was not enough."""
        if not self._draws:
            return
        adapter = self._export() if self._done else None
        self._train_mode(False)
        try:
            with self._trainer.suspended(), self._encoders.awake():
                self._job.draw(adapter, step=self._done)
        except Exception as error:
            if (what := memory_shortage(error)) is None:
                raise
            self._draws = False
            self._job.tell(f"Warning: no samples are drawn from here on, as {what}.", step=self._done)
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
        if self._processes.main:
            path = self._checkpoints.save(self._done, self._state())
            self._job.tell(f"Checkpoint after step {self._done}: {path}", step=self._done)
        self._checkpointed = self._done

    def _state(self) -> State:
        scaler = self._accelerator.scaler
        return {
            "identity": self._job.identity,
            "done": self._done,
            "skipped": self._skipped,
            "smoothed": self._course.smoothed,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "method": self._trainer.state(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state(),
            "validation": None if self._held_out is None else self._validation.state(),
        }

    def _rescue(self) -> None:
        """After an error, keep the steps that are done where they are good."""
        if self._settled and self._done > self._begun and self._guard.healthy():
            # What went wrong first is what the user must learn of.
            with contextlib.suppress(OutputError):
                self._checkpoint()

    def _load_progress(self, saved: State, optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(saved["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(saved["scaler"])
        if self._ema is not None:
            self._ema.load_state(saved["ema"])
        if self._held_out is not None:
            self._validation.load_state(saved["validation"])
        self._begun = self._done = self._checkpointed = saved["done"]
        self._skipped, self._course.smoothed = saved["skipped"], saved["smoothed"]

    def _average(self, number: int) -> None:
        """Give the parameters their mean over the last checkpoints that have as many of them."""
        if self._processes.main:
            states = [read(self._checkpoints.path(step))["parameters"] for step in self._checkpoints.steps()]
            shapes = [parameter.shape for parameter in self._parameters]
            alike = [state for state in states if [value.shape for value in state] == shapes][-number:]
            set_values(self._parameters, mean_of(alike))
            self._job.tell(f"The adapter is the mean of the last {len(alike)} checkpoints.", step=self._done)
        self._processes.equalize(self._parameters)
        self._trainer.values_set()
