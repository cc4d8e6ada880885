"""Gradients that 16 bits would lose are found all the same, and those nobody asks for cost no memory."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from studio.errors import BaseModelError
from studio.models.gradients import GradientScale, frozen, lean_convolutions


def slopes(size: float) -> list[Tensor]:
    """Return what fp16 holds of a gradient by numbers of a layer, times a factor that is tried."""

    def attempt(factor: float) -> list[Tensor]:
        return [(torch.tensor([size, -size / 3]) * factor).half()]

    found, factor = GradientScale().finite(attempt)
    return [each.float() / factor for each in found if each is not None]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 6e4])
def test_a_gradient_survives_fp16_whatever_its_size(size: float) -> None:
    (found,), wanted = slopes(size), torch.tensor([size, -size / 3])
    assert torch.allclose(found, wanted, rtol=2e-2, atol=0)  # 1e-9 times 2^16 has 7 bits left.


def test_what_is_not_finite_at_any_scale_says_the_way_out() -> None:
    with pytest.raises(BaseModelError, match=r"not finite.* Set precision to bf16 or fp32"):
        GradientScale().finite(lambda factor: [torch.tensor(float("nan"))])


def test_a_frozen_network_learns_again_afterwards_as_before() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    before = [parameter.requires_grad for parameter in network.parameters()]
    with pytest.raises(KeyError), frozen(network):
        assert not any(parameter.requires_grad for parameter in network.parameters())
        raise KeyError
    assert (
        [parameter.requires_grad for parameter in network.parameters()]
        == before
        == [True, True, False, False]
    )


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
    with lean_convolutions(network):
        lean = network(pixels)
        (found,) = torch.autograd.grad(lean.float().square().sum(), pixels)
    assert torch.equal(lean, plain) and torch.equal(found, wanted)
    assert found.dtype == pixels.dtype and lean.dtype == plain.dtype


def test_a_frozen_convolution_keeps_nothing_of_its_input() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5)).requires_grad_(False)
    pixels = torch.randn(2, 4, 16, 16, requires_grad=True)
    _, plain = kept_for_backward(network, lambda: network(pixels))
    with lean_convolutions(network):
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
        with lean_convolutions(network):
            found = torch.autograd.grad(network(pixels).sum(), (pixels, learning))
        assert all(map(torch.equal, found, wanted))
        learning.requires_grad_(False)


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
    assert found["frozen"][1] < 0.9 * found["plain"][1]
