"""Averages of the trained parameters over the course of a run, which draw cleaner than its last step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Ema:
    """The exponential moving average of the parameters, updated after every optimizer step.

    After step ``n`` the average keeps ``min(decay, n / (9 + n))`` of itself, so that the start is forgotten
    soon. A parameter that gets another length starts anew.

    Args:
        parameters: The trained parameters.
        decay: The share that is kept, 0 to 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float) -> None:
        self._parameters = list(parameters)
        self._average = EMAModel(self._parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """Take in the parameters as they are."""
        shadows = self._average.shadow_params
        for number, parameter in enumerate(self._parameters):
            if shadows[number].shape != parameter.shape:
                shadows[number] = parameter.detach().clone()
        self._average.step(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the averages' values for the length of a block."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        set_values(self._parameters, self._average.shadow_params)
        try:
            yield
        finally:
            set_values(self._parameters, own)

    def state(self) -> dict[str, Any]:
        """Return what going on needs."""
        return {"step": self._average.optimization_step, "values": list(self._average.shadow_params)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self._average.optimization_step = state["step"]
        self._average.shadow_params = [
            value.to(parameter.device)
            for value, parameter in zip(state["values"], self._parameters, strict=True)
        ]


@torch.no_grad()
def set_values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values into parameters, of any device."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def mean_of(states: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean of each parameter over several states of all parameters, added up in fp64.

    Stochastic weight averaging, arXiv:1803.05407, Alg. 1.
    """
    return [
        torch.stack([value.double() for value in values]).mean(0).float()
        for values in zip(*states, strict=True)
    ]
