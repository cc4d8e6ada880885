"""The course of a run in numbers, as its progress events tell it."""

from collections.abc import Sequence

from studio.trainers.base import ParameterGroup

SMOOTHING = 0.95


class Course:
    """Follows loss and time from step to step.

    Args:
        groups: What is trained.

    Attributes:
        smoothed: Moving average of the loss, from zero; part of a checkpoint.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._groups = groups
        self.smoothed = self._seconds = 0.0
        self._steps = 0

    def advance(self, loss: float, seconds: float, rates: Sequence[float], *, done: int) -> dict[str, float]:
        """Take in a step and return the values of its event.

        Args:
            loss: Of the step.
            seconds: That it took.
            rates: Learning rates of the groups in it.
            done: Steps that the run has done, those before it was resumed included.
        """
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self._seconds += seconds
        self._steps += 1
        values = {
            "loss": loss,
            # Without the divisor the average would start near zero.
            "loss_smoothed": self.smoothed / (1 - SMOOTHING**done),
            "steps_per_second": self._steps / self._seconds,
        }
        for group, rate in zip(self._groups, rates, strict=True):
            # Of a component with several rates the first.
            name = "learning_rate" if group.name == "unet" else f"{group.name}_learning_rate"
            values.setdefault(name, rate)
        return values
