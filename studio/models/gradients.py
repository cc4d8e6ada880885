"""Gradients through a base: none for its own weights, and none that 16 bits round to zero or to infinity."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from studio.errors import BaseModelError
from studio.models.shadow import shadowed

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
        with lean_convolutions(network):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def lean_convolutions(network: nn.Module) -> Iterator[None]:
    """Have convolutions keep nothing of their inputs while their weights are frozen.

    torch keeps them for the weights' gradient, whether or not anybody asks for that. Results are the same
    bits, gradients too.
    """
    with ExitStack() as stack:
        for module in network.modules():
            # Other paddings, and other classes, come to their results on a way of their own.
            if (
                type(module) is nn.Conv2d
                and module.padding_mode == "zeros"
                and not isinstance(module.padding, str)
            ):
                stack.enter_context(shadowed(module, {"_conv_forward": partial(_convolve, module)}))
        yield


def _convolve(module: nn.Conv2d, pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stand for a convolution's ``_conv_forward``."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or not pixels.requires_grad or not torch.is_grad_enabled():
        return nn.Conv2d._conv_forward(module, pixels, weight, bias)
    settings = module.stride, module.padding, module.dilation, module.groups
    convolved: Tensor = _FrozenConvolution.apply(pixels, weight, bias, *settings)
    return convolved


class _FrozenConvolution(torch.autograd.Function):
    """A convolution of which only the gradient by its input is asked for: its size is all that this takes."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.settings = pixels.shape, settings
        return F.conv2d(pixels, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (weight,) = ctx.saved_tensors
        (slope,) = slopes
        # Autocast may have convolved in another type than that of the weights.
        found = conv2d_input(ctx.size, weight.to(slope.dtype), slope, *ctx.settings)
        return (found, None, None, *(None for _ in ctx.settings))


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
