"""Gradients that 16 bits would lose are found all the same."""

import pytest
import torch
from torch import Tensor, nn

from studio.errors import BaseModelError
from studio.models.gradients import GradientScale, frozen


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
