"""The loss on pictures that are not trained on, and when it says that training has done what it can."""

import math
from typing import Any

from studio.data.picture import PictureSet
from studio.errors import TrainingError
from studio.specs.train import TrainSpec

DRAWS = 32
"""The least number of draws of noise and timestep that a measurement is the mean of."""


class Validation:
    """Remembers the best of the losses that are measured now and then.

    Args:
        patience: Measurements without a better one after which training stops; 0: never.
    """

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._best = math.inf
        self._without_better = 0

    def better(self, loss: float) -> bool:
        """Take in a loss; return whether it is the best so far."""
        better = loss < self._best
        self._best = min(loss, self._best)
        self._without_better = 0 if better else self._without_better + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return bool(self._patience) and self._without_better >= self._patience

    def ending(self, done: int, steps: int) -> str:
        """Return what to say of a run that ends so after ``done`` of its steps."""
        return (
            f"Stopped early after {done} of {steps} steps: the validation loss has not fallen for "
            f"{self._patience} measurements."
        )

    def state(self) -> dict[str, Any]:
        """Return what going on needs."""
        return {"best": self._best, "without_better": self._without_better}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self._best, self._without_better = state["best"], state["without_better"]


def check_validation(spec: TrainSpec, pictures: PictureSet | None) -> None:
    """Refuse to measure without pictures.

    Raises:
        TrainingError: If there are none, and measuring is asked for.
    """
    if pictures is None and (spec.validate_every or spec.patience):
        raise TrainingError(
            "validate_every or patience is set, but no pictures are held out. Give validation_split or "
            "validation_data."
        )
