"""What a run takes in memory and time: what is told before, and what its first steps show."""

import contextlib
import ctypes
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
    """Memory that a run holds from its first step on, in bytes, and its time.

    Attributes:
        base: Parameters and buffers of the base that are not trained, and what undoes a method's work.
        trained: The trained parameters, with the copy that is kept to go back to, and their average.
        gradients: Of the trained parameters.
        optimizer: What the optimizer keeps of them.
        offloaded: What waits on the CPU meanwhile; not among the others.
        activations: What forward and backward passes hold on top at the most; None where that is not known.
        seconds: Of a step; None where that is not known.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    offloaded: int = 0
    activations: int | None = None
    seconds: float | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.trained + self.coming

    @property
    def coming(self) -> int:
        """What the steps add to what is there before the first of them."""
        return self.gradients + self.optimizer + (self.activations or 0)

    def __str__(self) -> str:
        known = self.activations is not None
        parts = [
            f"base {size(self.base)}",
            f"trained parameters and their copy {size(self.trained)}",
            f"gradients {size(self.gradients)}",
            f"optimizer {size(self.optimizer)}",
            *([f"activations {size(self.activations or 0)}"] if known else []),
            *([f"{size(self.offloaded)} on the CPU"] if self.offloaded else []),
        ]
        much = f"about {size(self.total)}" if known else f"{size(self.total)} before activations"
        return f"Memory: {much} ({', '.join(parts)})"


def estimate(
    pipe: DiffusionPipeline,
    parameters: Iterable[nn.Parameter],
    *,
    aside: Iterable[Tensor] = (),
    optimizer: str = "adamw",
    averaged: bool = False,
    away: Collection[str] = (),
) -> Estimate:
    """Count what a run will hold.

    Args:
        pipe: The base as it is lent, with whatever the method added to it.
        parameters: Those that are trained.
        aside: What the method keeps to undo its work.
        optimizer: Its name.
        averaged: Whether a moving average is kept.
        away: Networks that wait on the CPU while training.
    """
    trained = {id(parameter): parameter for parameter in parameters}
    parts = networks(pipe)
    held = _held(part for name, part in parts.items() if name not in away)
    own = sum(map(_bytes, trained.values()))
    device = next(parts["unet"].parameters()).device if "unet" in parts else None
    kept = {id(value): value for value in aside}.values()
    return Estimate(
        base=sum(_bytes(value) for key, value in held.items() if key not in trained)
        + sum(_bytes(value) for value in kept if value.device == device),
        trained=(3 if averaged else 2) * own,
        gradients=own,
        optimizer=int(sum(_kept(optimizer, parameter) for parameter in trained.values())),
        offloaded=sum(map(_bytes, _held(parts[name] for name in away).values()))
        + sum(_bytes(value) for value in kept if value.device != device),
    )


class FirstSteps:
    """Measures the first two steps of a run, of which the second, which is warm, gives the time.

    Args:
        expected: The estimate.
        device: Where the run computes.
        steps: How many it has.
    """

    def __init__(self, expected: Estimate, device: torch.device, *, steps: int) -> None:
        self._expected, self._device, self._steps = expected, device, steps
        self._before = 0
        self._measured = False

    def expected(self) -> str:
        """Return what is to be expected."""
        seconds = self._expected.seconds
        if seconds is None:
            return f"{self._expected}."
        return (
            f"{self._expected}. Time: roughly {_of_step(seconds)} a step, "
            f"{duration(seconds * self._steps)} in all."
        )

    def begin(self) -> None:
        """Start measuring; call before the first step."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before, self._measured = torch.cuda.memory_allocated(self._device), True
        elif self._device.type == "cpu":
            # Linux forgets the peak of the resident memory when asked to; elsewhere it cannot be told.
            with contextlib.suppress(OSError):
                _return_freed()
                CLEAR.write_text("5")
                self._before, self._measured = _resident("VmRSS"), True

    def end(self, step: int, seconds: float) -> str | None:
        """Return what the measurements say once they are complete, else None.

        Args:
            step: Steps done.
            seconds: Time of the last one.
        """
        if step != min(2, self._steps):
            return None
        expected, parts = self._expected, []
        if self._measured:
            peak = (
                torch.cuda.max_memory_allocated(self._device)
                if self._device.type == "cuda"
                else _resident("VmHWM")
            )
            rise = max(0, peak - self._before)
            guess = "" if expected.activations is None else f" (estimated {size(expected.coming)})"
            parts.append(
                f"the first steps took {size(rise)} more at their peak{guess}, "
                f"{size(expected.total - expected.coming + rise)} in all"
            )
        if step == 2:
            guess = "" if expected.seconds is None else f" (estimated {_of_step(expected.seconds)})"
            parts.append(f"{seconds:.3g} s a step{guess}, about {duration(seconds * self._steps)} in all")
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


def _of_step(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _held(parts: Iterable[nn.Module]) -> dict[int, Tensor]:
    """Return what networks hold, each tensor once: parameters, buffers, statistics of quantised weights."""
    found: dict[int, Tensor] = {}
    for part in parts:
        beside = (value for module in part.modules() for value in statistics(module))
        found |= {id(value): value for value in (*part.parameters(), *part.buffers(), *beside)}
    return found


def _kept(optimizer: str, parameter: nn.Parameter) -> float:
    """Return the bytes that an optimizer keeps of a parameter."""
    # A vector has no rows and columns to keep instead, such as SaRA's.
    numbers = 1 if optimizer == "adafactor" and parameter.ndim == 1 else MOMENTS[optimizer]
    return numbers * _bytes(parameter)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _return_freed() -> None:
    """Have the C library return what was freed: taken from there again, it would not show as a rise."""
    # Only GNU's has it.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> int:
    """Return a line of the process's status in bytes: ``VmRSS`` is now, ``VmHWM`` the most so far."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
