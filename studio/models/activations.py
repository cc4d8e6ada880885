"""Activations that are kept for the backward pass, and those that it can do without."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from studio.models.shadow import shadowed


@contextmanager
def fewer_kept(network: nn.Module) -> Iterator[None]:
    """Have a network of diffusers keep fewer activations for the length of a block.

    Convolutions whose weights are frozen keep nothing of their inputs: torch keeps them for the weights'
    gradient, whether or not anybody asks for that. Gated activations (GEGLU, arXiv:2002.05202) keep what goes
    in, and compute the gate again in the backward pass. Results are the same bits, gradients too.
    """
    from diffusers.models.activations import GEGLU

    with ExitStack() as stack:
        for module in network.modules():
            # Subclasses, and convolutions with other paddings, may come to their results on another way.
            if type(module) is nn.Conv2d and _pads_by_zeros(module):
                stack.enter_context(shadowed(module, {"_conv_forward": partial(_convolve, module)}))
            # What moves an offloaded module to the GPU stands there.
            elif type(module) is GEGLU and "forward" not in vars(module):
                stack.enter_context(shadowed(module, {"forward": partial(_project_and_gate, module)}))
        yield


def _pads_by_zeros(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _convolve(module: nn.Conv2d, pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stand for a convolution's ``_conv_forward``."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or not pixels.requires_grad or not torch.is_grad_enabled():
        plain: Tensor = nn.Conv2d._conv_forward(module, pixels, weight, bias)
        return plain
    settings = module.stride, module.padding, module.dilation, module.groups
    lean: Tensor = _FrozenConvolution.apply(pixels, weight, bias, *settings)  # type: ignore[no-untyped-call]
    return lean


def _project_and_gate(module: Any, states: Tensor) -> Tensor:
    """Stand for the ``forward`` of diffusers' GEGLU."""
    gated: Tensor = _Gate.apply(module.proj(states))  # type: ignore[no-untyped-call]
    return gated


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


class _Gate(torch.autograd.Function):
    """The product of the first half of the last axis and the GELU of the second."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        states, gate = projected.chunk(2, dim=-1)
        return states * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (projected,) = ctx.saved_tensors
        (slope,) = slopes
        states, gate = projected.chunk(2, dim=-1)
        return torch.cat([slope * F.gelu(gate), torch.ops.aten.gelu_backward(slope * states, gate)], dim=-1)
