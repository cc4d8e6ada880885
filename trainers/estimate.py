"""What a run takes in memory and time: what can be counted before, and what its first steps show."""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from studio.models.quantization import statistics
from studio.trainers.borrow import networks

MOMENTS: Mapping[str, float] = {"adamw": 2, "adamw8bit": 0.5, "adafactor": 0, "lion": 1, "prodigy": 4}
"""fp32 numbers that an optimizer keeps for each parameter; Adafactor's are few."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Estimate:
    """Memory that a run holds from its first step on, in bytes; what a pass needs for a while comes on top.

    Attributes:
        base: Parameters and buffers of the base that are not trained, and those that others
            stand in for.
        trained: The trained parameters, with the copy that is kept to go back to, and their average.
        gradients: Of the trained parameters.
        optimizer: What the optimizer keeps of them.
        offloaded: Of the base, what waits on the CPU meanwhile; not among the others.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.gradients + self.optimizer

    def __str__(self) -> str:
        return (
            f"Memory: {size(self.total)} before activations (base {size(self.base)}, trained parameters and "
            f"their copy {size(self.trained)}, gradients {size(self.gradients)}, optimizer "
            f"{size(self.optimizer)}{f', {size(self.offloaded)} on the CPU' if self.offloaded else ''})"
        )


def estimate(
    pipe: DiffusionPipeline,
    parameters: Iterable[nn.Parameter],
    *,
    aside: int = 0,
    optimizer: str = "adamw",
    averaged: bool = False,
    away: Collection[str] = (),
) -> Estimate:
    """Count what a run will hold.

    Args:
        pipe: The base as it is lent, with whatever the method added to it.
        parameters: Those that are trained.
        aside: Bytes of the base's own weights that trained ones stand in for.
        optimizer: Its name.
        averaged: Whether a moving average is kept.
        away: Networks that wait on the CPU while training.
    """
    trained = {id(parameter): parameter for parameter in parameters}
    parts = networks(pipe)
    held = _held(part for name, part in parts.items() if name not in away)
    own = sum(map(_bytes, trained.values()))
    return Estimate(
        base=sum(_bytes(value) for key, value in held.items() if key not in trained) + aside,
        trained=(3 if averaged else 2) * own,
        gradients=own,
        optimizer=int(MOMENTS[optimizer] * own),
        offloaded=sum(map(_bytes, _held(parts[name] for name in away).values())),
    )


class FirstSteps:
    """Measures the first two steps of a run: the first for memory, the second, which is warm, for time.

    Args:
        expected: The estimate.
        device: Where the run computes.
        steps: How many it has.
    """

    def __init__(self, expected: Estimate, device: torch.device, *, steps: int) -> None:
        self._expected, self._device, self._steps = expected, device, steps
        self._before = self._rise = 0
        self._measured = False

    def begin(self) -> None:
        """Start measuring; call before the first step."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before, self._measured = torch.cuda.memory_allocated(self._device), True
        elif self._device.type == "cpu":
            # Linux forgets the peak of the resident memory when asked to; elsewhere it cannot be told.
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")
                self._before, self._measured = _resident("VmRSS"), True

    def end(self, step: int, seconds: float) -> str | None:
        """Return what the measurements say once they are complete, else None.

        Args:
            step: Steps done.
            seconds: Time of the last one.
        """
        if step == 1 and self._measured:
            peak = (
                torch.cuda.max_memory_allocated(self._device)
                if self._device.type == "cuda"
                else _resident("VmHWM")
            )
            self._rise = peak - self._before
        if step != min(2, self._steps):
            return None
        parts = []
        if self._measured:
            kept = self._expected.gradients + self._expected.optimizer
            activations = max(0, self._rise - kept)
            parts.append(
                f"the first step took {size(self._rise)} more at its peak, so about {size(activations)} "
                f"beyond gradients and optimizer, {size(self._expected.total + activations)} in all"
            )
        if step == 2:
            parts.append(f"{seconds:.3g} s a step, about {duration(seconds * self._steps)} in all")
        return f"Measured: {'; '.join(parts)}." if parts else None


def size(number: float) -> str:
    """Return a number of bytes in words, in powers of 1024."""
    units = ["bytes", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        del units[0]
    return f"{number:.0f} {units[0]}" if number >= 100 else f"{number:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _held(parts: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return what networks hold, each tensor once: parameters, buffers, statistics of quantised weights."""
    found: dict[int, Tensor] = {}
    for part in parts:
        beside = (value for module in part.modules() for value in statistics(module))
        found |= {id(value): value for value in (*part.parameters(), *part.buffers(), *beside)}
    return found


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _resident(name: str) -> int:
    """Return a line of the process's status in bytes: ``VmRSS`` is now, ``VmHWM`` the most so far."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
