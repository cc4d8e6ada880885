"""Learnable weights for the columns of two adapters' changes, beside the layers of a UNet.

    delta = delta_c diag(m_c) + delta_s diag(m_s)                         ZipLoRA, arXiv:2311.13600, Eq. 4

A diagonal matrix behind ``B A`` scales the columns of ``A``, so nothing is ever larger than the factors: a
layer gets two thin branches, gradients reach ``m`` alone, and the result is one low-rank change of the ranks
of both together,

    B_c A_c diag(m_c) + B_s A_s diag(m_s) = [B_c, B_s] [A_c diag(m_c); A_s diag(m_s)].

Of a convolution a column is an input channel, all of its kernel alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.adapter import Adapter, Change
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.parameters import find_parameter
from studio.errors import AdapterError


class Columns:
    """Two adapters' changes of a UNet with a weight for each column, 1 at first.

    Args:
        components: Of the pipeline, see ``components_of``.
        adapters: The two, by name, fitted to it; their text-encoder parts are left alone.
        weights: By name.

    Attributes:
        layers: By parameter, in the order in which the first adapter, then the second names them.

    Raises:
        AdapterError: If a change is not low-rank.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        adapters: Mapping[str, Adapter],
        weights: Mapping[str, float],
    ) -> None:
        self._sides = tuple(adapters)
        self._owners: dict[int, list[nn.Module]] = {}
        for module in components["unet"].modules():
            for parameter in module._parameters.values():
                self._owners.setdefault(id(parameter), []).append(module)
        self.layers: dict[str, _Layer] = {}
        for side, adapter in adapters.items():
            for name, change in adapter.changes.items():
                if name.startswith("unet."):
                    parameter = find_parameter(components, name)
                    layer = self.layers.setdefault(name, _Layer(parameter))
                    layer.add(side, name, change, weights[side])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learnt, fp32 ``[columns]`` each."""
        return [part.columns for layer in self.layers.values() for part in layer.parts.values()]

    def penalty(self) -> Tensor:
        """Return how much both use the same columns: mean of ``|m_c m_s|``, summed over shared layers."""
        shared = [self._both(layer) for layer in self.layers.values() if len(layer.parts) == 2]
        return (
            torch.stack([(one * other).abs().mean() for one, other in shared]).sum()
            if shared
            else torch.zeros(())
        )

    def overlap(self) -> float:
        """Return the penalty as a mean over the shared layers: 1 at first, 0 where nothing is shared."""
        shared = sum(len(layer.parts) == 2 for layer in self.layers.values())
        return float(self.penalty().detach()) / shared if shared else 0.0

    @contextmanager
    def acting(self, *sides: str, zipped: bool) -> Iterator[None]:
        """Let changes act beside the weights for the length of a block.

        Args:
            sides: Names of the adapters that act.
            zipped: Whether with their columns' weights.
        """
        with ExitStack() as stack:
            for layer in self.layers.values():
                factors = layer.factors(sides, zipped=zipped)
                if factors is not None:
                    for module in self._owners[id(layer.parameter)]:
                        stack.callback(module.register_forward_hook(_adding(*factors)).remove)
            yield

    @torch.no_grad()
    def changes(self) -> dict[str, LoraChange]:
        """Return the low-rank changes that the weighted columns make, fp32 on the CPU, alpha their rank."""
        found = {}
        for name, layer in self.layers.items():
            factors = layer.factors(self._sides, zipped=True)
            assert factors is not None
            down, up = (factor.detach().cpu().contiguous() for factor in factors)
            found[name] = LoraChange(down, up, float(len(down)))
        return found

    def _both(self, layer: "_Layer") -> Sequence[Tensor]:
        return [layer.parts[side].columns for side in self._sides]


class _Part:
    """One adapter's change of a layer."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up
        self.columns = nn.Parameter(torch.ones(down.shape[1], device=down.device))

    def weighted(self) -> Tensor:
        """Return ``A diag(m)``."""
        return self.down * self.columns.view(1, -1, *(1 for _ in self.down.shape[2:]))


class _Layer:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.parts: dict[str, _Part] = {}

    def add(self, side: str, name: str, change: Change, weight: float) -> None:
        pair = change.low_rank()
        if pair is None:
            raise AdapterError(
                f"'{side}' changes '{name}' in a way that has no low rank, and only columns of low-rank "
                "changes can be weighted. Write it anew with `studio convert --rank N`."
            )
        down, up = (factor.detach().to(self.parameter.device, torch.float32) for factor in pair)
        self.parts[side] = _Part(down, up * weight)

    def factors(self, sides: Sequence[str], *, zipped: bool) -> tuple[Tensor, Tensor] | None:
        """Return ``A`` and ``B`` of the changes together, or None if none of the adapters has one."""
        parts = [self.parts[side] for side in sides if side in self.parts]
        if not parts:
            return None
        down = torch.cat([part.weighted() if zipped else part.down for part in parts])
        return down, torch.cat([part.up for part in parts], dim=1)


def _adding(down: Tensor, up: Tensor) -> Any:
    """Return a hook that adds ``B A x`` to what a layer gives."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In the type that the layer itself computes in.
        x, first, second = inputs[0].to(output.dtype), down.to(output.dtype), up.to(output.dtype)
        if isinstance(module, nn.Conv2d):
            moves = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
            return output + F.conv2d(F.conv2d(x, first, **moves), second)
        return output + F.linear(F.linear(x, first), second)

    return hook
