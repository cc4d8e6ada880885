"""The one training loop of the builder: it saves, resumes exactly, and stops when its time is up."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

_SYNC = 20  # steps between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class Schedule:
    """How long a part is trained, and how.

    Attributes:
        steps: Steps in all, counted over all runs.
        rate: Highest learning rate.
        warmup: Steps until it is reached.
        decay: Last share of the training in which the rate falls to zero along a cosine.
        ema: Decay of the averaged weights; no average is kept at 0.
        weight_decay: Of AdamW.
        seconds: Seconds of training in all, counted over all runs, in place of ``steps``.
    """

    steps: int
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.0
    weight_decay: float = 0.01
    seconds: float | None = None

    def progress(self, step: int, spent: float) -> float:
        """Return the share of the training that is done: 1 at its end.

        Args:
            step: Steps done.
            spent: Seconds of training.
        """
        return step / self.steps if self.seconds is None else spent / self.seconds

    def rate_at(self, step: int, spent: float) -> float:
        """Return the learning rate of a step."""
        left = max(0.0, 1 - self.progress(step, spent))
        fall = 0.5 - 0.5 * math.cos(math.pi * left / self.decay) if left < self.decay else 1.0
        return self.rate * min(1.0, (step + 1) / self.warmup) * fall


@dataclass(frozen=True)
class Machine:
    """Where and how long to train.

    Attributes:
        device: "cpu" or "cuda".
        compile: Whether to compile networks.
        deadline: ``time.monotonic()`` at which to save and stop.
        save_seconds: Seconds between saves.
    """

    device: str = "cpu"
    compile: bool = False
    deadline: float = math.inf
    save_seconds: float = 240

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def layout(self) -> torch.memory_format:
        """How convolutions' weights and pictures lie in memory.

        Channels come last where that is faster; on CPUs group norm in bf16 is several times slower then.
        """
        return torch.contiguous_format if self.device == "cpu" else torch.channels_last

    def autocast(self) -> torch.autocast:
        """Return the context in which networks compute: bf16 products, fp32 weights."""
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def generator(self, seed: int, step: int) -> torch.Generator:
        """Return the random numbers of one step, the same in every run on this kind of device."""
        return torch.Generator(self.device).manual_seed(seed * 1_000_003 + step)


@dataclass
class Training:
    """What a training carries from step to step; its state file holds the same (not for publication).

    Attributes:
        model: What is trained, in place.
        average: The averaged weights; the model itself where no average is kept.
        step: Steps done.
        spent: Seconds of training.
        loss: Mean over the last hundred or so steps.
    """

    model: nn.Module
    schedule: Schedule
    average: nn.Module = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    step: int = 0
    spent: float = 0.0
    loss: float = math.nan

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.model).eval() if self.schedule.ema else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.schedule.rate,
            betas=(0.9, 0.99),
            weight_decay=self.schedule.weight_decay,
            fused=True,
        )

    @property
    def done(self) -> bool:
        """Whether the whole training is over."""
        return self.schedule.progress(self.step, self.spent) >= 1

    def resume(self, state: Path, device: torch.device) -> None:
        """Take up a state file."""
        saved = torch.load(state, map_location=device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.spent, self.loss = saved["step"], saved["spent"], saved["loss"]

    def write(self, state: Path) -> None:
        """Write the state file at once or not at all."""
        temporary = state.with_suffix(".tmp")
        parts: dict[str, Any] = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        counts = {"step": self.step, "spent": self.spent, "loss": self.loss}
        torch.save({name: part.state_dict() for name, part in parts.items()} | counts, temporary)
        os.replace(temporary, state)

    def update(self, loss: Tensor) -> None:
        """Take one step down the gradient of the loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step, self.spent)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.schedule.ema:
            # The first weights are far off: an average that is as young as the model forgets them.
            decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.average.parameters()), list(self.model.parameters()), 1 - decay
                )


def train(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    schedule: Schedule,
    machine: Machine,
    state: Path,
    name: str,
    save: Callable[[Training], None] | None = None,
) -> Training:
    """Train until the schedule is over or the machine's deadline has come, from the state file on.

    Args:
        model: Trained in place; already on the device.
        loss_at: Returns the loss of a step, the same for the same step and weights.
        schedule: Length and rates.
        machine: Device and deadline.
        state: Rewritten at each save.
        name: Shown in the progress bar.
        save: Called at each save.
    """
    training = Training(model, schedule)
    if state.exists():
        training.resume(state, machine.torch_device)
    if training.done:
        return training
    with _progress(training, name) as progress:
        saved = time.monotonic()
        total, unseen = torch.zeros((), device=machine.torch_device), 0
        since = time.monotonic()
        while not training.done and time.monotonic() < machine.deadline:
            loss = loss_at(training.step)
            training.update(loss)
            total, unseen = total + loss.detach(), unseen + 1
            if unseen == _SYNC or training.done:
                training.loss = _smooth(training.loss, float(total) / unseen)
                total, unseen = torch.zeros_like(total), 0
                progress(training)
            now = time.monotonic()
            training.spent, since = training.spent + now - since, now
            if now - saved > machine.save_seconds:
                _save(training, state, save)
                saved = since = time.monotonic()
        _save(training, state, save)
    return training


def _smooth(mean: float, latest: float) -> float:
    return latest if math.isnan(mean) else 0.8 * mean + 0.2 * latest


def _save(training: Training, state: Path, save: Callable[[Training], None] | None) -> None:
    training.write(state)
    if save:
        save(training)


@contextmanager
def _progress(training: Training, name: str) -> Iterator[Callable[[Training], None]]:
    """Show share done, steps and loss."""
    shape = "{l_bar}{bar}| {elapsed} {postfix}"
    # Hours pass between two per cent, and the loss is of interest all the while.
    with tqdm(total=100.0, desc=name, mininterval=10, miniters=0, bar_format=shape) as bar:

        def show(now: Training) -> None:
            bar.n = min(100.0, 100 * now.schedule.progress(now.step, now.spent))
            bar.set_postfix(step=now.step, loss=f"{now.loss:.4f}", refresh=False)
            bar.update(0)

        show(training)
        yield show
