"""Gradients through a base: none for its own weights, and none that 16 bits round to zero or to infinity."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from studio.errors import BaseModelError
from studio.models.activations import fewer_kept

FIRST_FACTOR = 2.0**16
LEAST_FACTOR = 2.0**-8
STEP = 2.0**4


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep gradients off a network's own parameters for the length of a block.

    Without this autograd also keeps what it would take to find them.
    """
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    try:
        with fewer_kept(network):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class GradientScale:
    """What a loss is multiplied by so that its gradients survive 16 bits; found by trying, and kept.

    A power of two, so it changes no bit of what survives without. Mixed precision training,
    arXiv:1710.03740, Sec. 3.2.
    """

    def __init__(self) -> None:
        self._factor = FIRST_FACTOR

    def finite(
        self, attempt: Callable[[float], Sequence[Tensor | None]]
    ) -> tuple[Sequence[Tensor | None], float]:
        """Return what an attempt gives, and the factor to divide it by, in fp32.

        Args:
            attempt: From a factor to the gradients of a loss that is multiplied by it. While any of them is
                not finite it is made again with a smaller one.

        Raises:
            BaseModelError: If they are not finite with any.
        """
        while True:
            found = attempt(self._factor)
            if all(each is None or bool(each.isfinite().all()) for each in found):
                return found, self._factor
            if self._factor <= LEAST_FACTOR:
                raise BaseModelError(
                    "gradients through the base are not finite: its answers overflow. Set precision to bf16 "
                    "or fp32, or choose another base."
                )
            self._factor /= STEP
