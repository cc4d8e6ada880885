"""Where LoRA starts from: the weights' principal parts, the loss's gradient, or the layers' inputs.

PiSSA and LoRA-GA start with a product that is not zero, B0 A0, and take it from the base so that the network
computes what it did. Here the base keeps its weights: a second, frozen adapter of peft's holds B0 A0 with the
opposite sign. What was learned is then the plain low-rank change of twice the rank

    B A - B0 A0 = [B, -B0] [A; A0]

without a rounding of the base in between.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from studio.adapters.kinds.lora import LoraChange
from studio.data.batches import derived_seed
from studio.models.gradients import GradientScale
from studio.trainers.layer_method import PEFT_NAME, copied
from studio.trainers.processes import ALONE, Processes

OFFSET_NAME = "studio_start"
"""peft's name of the adapter that takes the start's product away again."""

POWER_ITERATIONS = 8
GAMMA = 16
"""LoRA-GA's gamma, its paper's choice: larger starts smaller."""


class Mixer(nn.Module):
    """A square matrix between the up and the down matrix. MoSLoRA, arXiv:2406.11909, Eq. 5.

    As a parametrization of the up matrix: everybody who reads it finds the folded product.

    Args:
        rank: Its side.
        device: Where it lies.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.eye(rank, device=device))

    def forward(self, up: Tensor) -> Tensor:
        """Return ``up @ mixer`` in the shape of ``up``, ``[out, rank]`` or ``[out, rank, 1, 1]``."""
        return (up.flatten(1) @ self.mixer).view_as(up)


def add_mixer(layer: Any) -> None:
    """Put a mixer between the matrices of one of peft's LoRA layers."""
    up = layer.lora_B[PEFT_NAME]
    # In fp32 like all that is trained, which a parametrization must not change later.
    up.weight.data = up.weight.data.float()
    parametrize.register_parametrization(up, "weight", Mixer(up.weight.shape[1], up.weight.device))


def turn_offset(layer: Any) -> None:
    """Let the second adapter of one of peft's LoRA layers take away what the first one starts with."""
    layer.set_adapter([PEFT_NAME, OFFSET_NAME])
    layer.scaling[OFFSET_NAME] = -layer.scaling[PEFT_NAME]


def set_offset(layer: Any, down: Tensor, up: Tensor) -> None:
    """Let a layer start with a product, and its offset take the same away.

    Args:
        layer: With an offset.
        down: ``[rank, in * kh * kw]``.
        up: ``[out, rank]``.
    """
    for name in (PEFT_NAME, OFFSET_NAME):
        for matrix, values in ((layer.lora_A, down), (layer.lora_B, up)):
            weight = matrix[name].weight
            weight.copy_(values.reshape(weight.shape))


def less_offset(layer: Any, change: LoraChange) -> LoraChange:
    """Return a layer's change less what it started with, at twice the rank and the same scale."""
    down, up = (copied(matrix[OFFSET_NAME].weight) for matrix in (layer.lora_A, layer.lora_B))
    return LoraChange(torch.cat([change.down, down]), torch.cat([change.up, -up], dim=1), 2 * change.alpha)


def principal_part(layer: Any, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return PiSSA's start: factors of the weight's best approximation of the layer's rank, scale left out.

    arXiv:2404.02948, Eq. 2 and 3, by its fast decomposition.
    """
    rank, scale = layer.r[PEFT_NAME], layer.scaling[PEFT_NAME]
    seed = int(torch.randint(2**62, (), generator=generator))
    left, values, right = leading(layer.base_layer.weight.detach(), rank, seed=seed)
    root = (values / scale).sqrt()
    return root[:, None] * right.mT, left * root


def start_from_gradient(
    layers: Mapping[str, Any],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    seed: int,
    processes: Processes = ALONE,
) -> None:
    """Start so that the first step goes where full training would. LoRA-GA, arXiv:2407.05000, Alg. 1.

    Args:
        layers: peft's, with offsets, by name; all others are frozen.
        loss: Of the n-th batch, with its graph.
        batches: How many to look at.
        seed: Of the decomposition.
        processes: Those of which each has a share of the batches.

    Raises:
        BaseModelError: If the gradients are not finite.
    """
    weights = {name: layer.base_layer.weight for name, layer in layers.items()}

    def look(factor: float) -> list[Tensor | None]:
        for weight in weights.values():
            weight.grad = None
        for number in range(batches):
            (loss(number) * factor).backward()
        processes.average_gradients(list(weights.values()))
        return [weight.grad for weight in weights.values()]

    trained = [parameter for layer in layers.values() for parameter in layer.parameters()]
    wanted = [parameter for parameter in trained if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        _, factor = GradientScale().finite(look)
        for name, layer in layers.items():
            gradient, rank = weights[name].grad, layer.r[PEFT_NAME]
            weights[name].grad = None
            # A layer that the loss does not depend on has no gradient, and keeps the start that it has.
            if gradient is not None and gradient.any():
                gradient = gradient.float() / factor
                left, _, right = leading(gradient, 2 * rank, seed=derived_seed(seed, name, "gradient"))
                size = len(gradient) ** 0.25 / math.sqrt(GAMMA)
                with torch.no_grad():
                    set_offset(layer, size * right.mT[:rank], size * left[:, rank:])
    finally:
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)


def start_from_inputs(
    layers: Mapping[str, Any],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    seed: int,
    processes: Processes = ALONE,
) -> None:
    """Start with the directions in which the layers' inputs vary most. EVA, arXiv:2410.07170, Sec. 3.

    Differs from the paper: every layer keeps the rank that it has.

    Args:
        layers: peft's, by name.
        loss: Of the n-th batch.
        batches: How many to look at.
        seed: Of the decompositions.
        processes: Those of which each has a share of the batches.
    """
    seen = {
        name: Directions(layer.base_layer, layer.r[PEFT_NAME], derived_seed(seed, name, "inputs"), processes)
        for name, layer in layers.items()
    }
    hooks = [layer.register_forward_pre_hook(seen[name].look) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for number in range(batches):
                loss(number)
            for name, layer in layers.items():
                down = layer.lora_A[PEFT_NAME].weight
                directions = seen[name].directions
                # A layer that never ran, or saw less variety than its rank, keeps its random start there.
                if directions is not None:
                    down.view(len(down), -1)[: len(directions)] = directions
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Directions:
    """The leading directions of a layer's inputs, kept up to date batch by batch.

    Attributes:
        layer: The base's own, linear or convolution.
        rank: How many directions.
        seed: Of the decompositions.
        processes: Those whose inputs are looked at together.
    """

    layer: Any
    rank: int
    seed: int
    processes: Processes = ALONE
    _weighted: Tensor | None = field(default=None, repr=False)

    @property
    def directions(self) -> Tensor | None:
        """Orthonormal rows ``[rank or fewer, in * kh * kw]``, or None before the first batch."""
        return None if self._weighted is None else functional.normalize(self._weighted[: self.rank], dim=1)

    def look(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in the inputs of a forward pass; fits a forward pre-hook."""
        rows = self.processes.gathered(self._rows(inputs[0].detach().float()))
        if self._weighted is not None:
            rows = torch.cat([self._weighted, rows])
        # More than asked for: what is small in one batch may not be in the next.
        _, values, right = leading(rows, min(4 * self.rank, *rows.shape), seed=self.seed)
        kept = values > values.max() * torch.finfo(torch.float32).eps * max(rows.shape)
        self._weighted = (values[kept, None] * right.mT[kept]).clone()

    def _rows(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        if not isinstance(layer, nn.Conv2d):
            return inputs.flatten(0, -2)
        # The base's convolutions state their padding in pixels.
        padding = cast("tuple[int, ...]", layer.padding)
        patches = functional.unfold(
            inputs, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
        )
        return patches.mT.flatten(0, 1)


def leading(matrix: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values of a matrix, found by power iterations.

    Args:
        matrix: ``[out, in...]``, taken as ``[out, in * ...]`` in fp32.
        rank: How many; at most the smaller side.
        seed: Of the iterations' start.

    Returns:
        ``[out, rank]``, ``[rank]`` descending and ``[in * ..., rank]``.
    """
    flat = matrix.detach().float().flatten(1)
    # More columns than asked for make the last of them accurate, too.
    columns = min(2 * rank + 8, *flat.shape)
    devices = [flat.device] if flat.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(flat, q=columns, niter=POWER_ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank]
