"""Fewer activations are kept for the backward pass, and the gradients are the same bits."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from studio.models.activations import fewer_kept
from studio.models.gradients import frozen


def kept_for_backward(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return a result and the bytes that autograd keeps of it beside parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, sum(size for place, size in kept.items() if place not in own)


@pytest.fixture(params=["fp32", "autocast"])
def precision(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Compute in fp32 or in mixed precision."""
    with nullcontext() if request.param == "fp32" else torch.autocast("cpu", dtype=torch.bfloat16):
        yield


CONVOLUTIONS = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1, bias=False),
    "down": dict(kernel_size=3, stride=2, padding=1),
    "groups": dict(kernel_size=3, padding=2, dilation=2, groups=4),
    "same": dict(kernel_size=3, padding="same"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_frozen_convolution_has_the_same_gradient_by_its_input(
    settings: dict[str, Any], precision: None
) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(8, 12, **settings).requires_grad_(False)
    pixels = torch.randn(2, 8, 9, 7, requires_grad=True)
    plain = network(pixels)
    (wanted,) = torch.autograd.grad(plain.float().square().sum(), pixels)
    with fewer_kept(network):
        lean = network(pixels)
        (found,) = torch.autograd.grad(lean.float().square().sum(), pixels)
    assert torch.equal(lean, plain) and torch.equal(found, wanted)
    assert found.dtype == pixels.dtype and lean.dtype == plain.dtype


def test_a_frozen_convolution_keeps_nothing_of_its_input() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5)).requires_grad_(False)
    pixels = torch.randn(2, 4, 16, 16, requires_grad=True)
    _, plain = kept_for_backward(network, lambda: network(pixels))
    with fewer_kept(network):
        _, lean = kept_for_backward(network, lambda: network(pixels))
    assert plain - lean == pixels.nbytes
    assert "_conv_forward" not in vars(network[0])


def test_a_convolution_that_learns_has_its_own_gradients() -> None:
    network = nn.Conv2d(4, 4, 3).requires_grad_(False)
    pixels = torch.randn(2, 4, 8, 8, requires_grad=True)
    for learning in (network.weight, network.bias):
        assert learning is not None
        learning.requires_grad_(True)
        wanted = torch.autograd.grad(network(pixels).sum(), (pixels, learning))
        with fewer_kept(network):
            found = torch.autograd.grad(network(pixels).sum(), (pixels, learning))
        assert all(map(torch.equal, found, wanted))
        learning.requires_grad_(False)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
def test_a_gated_activation_keeps_what_goes_in_and_has_the_same_gradients(
    learns: bool, precision: None
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(GEGLU(8, 32)).requires_grad_(learns)
    states = torch.randn(2, 5, 8, requires_grad=True)
    leaves = (states, *network.parameters()) if learns else (states,)
    plain, kept = kept_for_backward(network, lambda: network(states))
    wanted = torch.autograd.grad(plain.float().square().sum(), leaves)
    with fewer_kept(network):
        lean, fewer = kept_for_backward(network, lambda: network(states))
        found = torch.autograd.grad(lean.float().square().sum(), leaves)
    assert torch.equal(lean, plain) and all(map(torch.equal, found, wanted))
    assert kept - fewer == plain.nbytes
    assert "forward" not in vars(network[0])


def test_what_moves_an_offloaded_activation_stays() -> None:
    network = nn.Sequential(GEGLU(4, 4))
    network[0].forward = moved = lambda states: states + 1
    with fewer_kept(network):
        assert network[0].forward is moved


def test_frozen_blocks_of_a_unet_keep_less_and_give_the_same_gradients(short_sd: Callable[[], Any]) -> None:
    unet = short_sd().unet
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    text = torch.randn(1, 7, unet.config.cross_attention_dim)
    found = {}
    for name, around in {"plain": nullcontext(), "frozen": frozen(unet)}.items():
        unet.requires_grad_(False)
        with around:
            result, kept = kept_for_backward(unet, lambda: unet(latents, 10, text).sample)
            found[name] = (torch.autograd.grad(result.square().sum(), latents)[0], kept)
    assert torch.equal(found["plain"][0], found["frozen"][0])
    assert found["frozen"][1] < 0.8 * found["plain"][1]
