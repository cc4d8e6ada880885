"""Parameters kept from the last moment at which training was healthy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Guard:
    """A copy of the trained parameters that lags behind: only values that gave a finite loss enter it.

    Args:
        parameters: The trained parameters.
        steps: Optimizer steps that they have behind them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, steps: int = 0) -> None:
        self._parameters = list(parameters)
        self._kept: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]
        self.steps = steps
        """Optimizer steps that the kept values have behind them."""

    def keep(self, steps: int) -> None:
        """Take the parameters as they are, after ``steps`` optimizer steps; their shapes may have changed."""
        with torch.no_grad():
            for number, parameter in enumerate(self._parameters):
                if self._kept[number].shape != parameter.shape:
                    self._kept[number] = torch.empty_like(parameter)
            torch._foreach_copy_(self._kept, [parameter.detach() for parameter in self._parameters])
        self.steps = steps

    def healthy(self) -> bool:
        """Return whether all parameters are finite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters)

    def restore(self) -> None:
        """Write the kept values back into the parameters."""
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in self._parameters], self._kept)
