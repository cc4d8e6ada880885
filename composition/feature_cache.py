"""Deep features of a UNet, kept from one step to the next: what its outer layers compute anew every time.

DeepCache, arXiv:2312.00858. Neighbouring steps differ little in the deep, low-resolution layers. A full
pass leaves the hidden state at one place on the way up in a slot; a shallow pass takes it from there and
computes only the layers outside. The denoiser's own forward pass runs: the layers that are skipped have their
``forward`` shadowed meanwhile, and what they return is never used.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.composition.plan import Cut
from studio.errors import CompositionError
from studio.models.shadow import shadowed


@dataclass(frozen=True)
class _Kept:
    """What a layer gave, and at which step."""

    output: Any
    step: int


class FeatureCache:
    """Slots of deep features of one UNet.

    Args:
        unet: With the blocks of ``UNet2DConditionModel``.
        cut: Which part is shallow.

    Raises:
        CompositionError: If the UNet has no such part.
    """

    def __init__(self, unet: Any, cut: Cut) -> None:
        down, up = list(unet.down_blocks), list(unet.up_blocks)
        if not 0 <= cut.level < len(down):
            raise CompositionError(
                f"cut level must be from 0 to {len(down) - 1} for this base, got {cut.level}."
            )
        outer, inner = down[cut.level], up[-1 - cut.level]
        most = min(len(outer.resnets), len(inner.resnets) - 1)
        if not 1 <= cut.layers <= most:
            raise CompositionError(
                f"cut layers must be from 1 to {most} at level {cut.level} of this base, got {cut.layers}."
            )
        first = len(inner.resnets) - 1 - cut.layers
        before = _layers(inner, slice(first)) or [
            up[-2 - cut.level] if cut.level + 1 < len(up) else unet.mid_block
        ]
        self._tap = before[-1]
        self._passed = [*_layers(outer, slice(cut.layers, None)), *_layers(inner, slice(first))]
        self._downsamplers = list(outer.downsamplers or ())
        self._dropped = [*down[cut.level + 1 :], unet.mid_block, *up[: -1 - cut.level]]
        self._middle = unet.mid_block if cut.level + 1 < len(down) else None
        self._slots: dict[Hashable, _Kept] = {}

    def has(self, slot: Hashable, *, rows: int, since: int) -> bool:
        """Return whether a slot has features of that many rows, kept at step ``since`` or later."""
        kept = self._slots.get(slot)
        return kept is not None and kept.step >= since and len(_tensor(kept.output)) == rows

    @contextmanager
    def keeping(self, slots: Sequence[tuple[Hashable, int]], *, step: int) -> Iterator[None]:
        """Have full passes inside the block leave their features.

        Args:
            slots: For the rows of the batch in their order, the slot (None for none) and their number.
            step: Index of the step.
        """
        original = self._tap.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            parts = _tensor(output).split([rows for _, rows in slots])
            for (slot, _), part in zip(slots, parts, strict=True):
                if slot is not None:
                    # A copy: FreeU writes into what a block is given.
                    self._slots[slot] = _Kept(_like(output, part.clone()), step)
            return output

        with shadowed(self._tap, {"forward": keep}):
            yield

    @contextmanager
    def reusing(self, slots: Sequence[Hashable]) -> Iterator[None]:
        """Have passes inside the block compute the shallow part only.

        Args:
            slots: Where the deep features of the batch are, in the order of its rows.
        """
        kept = [self._slots[slot].output for slot in slots]
        feature = torch.cat([_tensor(each) for each in kept])
        empty = feature.new_zeros(1, 1, 1, 1)
        shadows: dict[nn.Module, Callable[..., Any]] = {module: _pass for module in self._passed}
        for block in self._dropped:
            # What stands before a layer that joins a skip to it must be as large as the skip.
            shadows[block] = _drop_down(block, empty) if hasattr(block, "downsamplers") else _give(feature)
        # A ControlNet adds residuals of another size to these.
        small = [*self._downsamplers, *([self._middle] if self._middle is not None else [])]
        shadows.update(dict.fromkeys(small, _give(empty)))
        # Apart from what stands before it, which FreeU may have written into.
        shadows[self._tap] = _give(_like(kept[0], feature.clone()))
        with ExitStack() as stack:
            for module, forward in shadows.items():
                stack.enter_context(shadowed(module, {"forward": forward}))
            yield


def _layers(block: Any, which: slice) -> list[nn.Module]:
    """Return the layers of a block in the order in which they run."""
    found: list[nn.Module] = []
    attentions = getattr(block, "attentions", None)
    for place in range(len(block.resnets))[which]:
        found.append(block.resnets[place])
        if attentions is not None:
            found.append(attentions[place])
    return found


def _pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Attention layers are asked for a tuple.
    return (hidden_states,) if kwargs.get("return_dict") is False else hidden_states


def _give(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _drop_down(block: Any, empty: Tensor) -> Callable[..., Any]:
    skips = len(block.resnets) + len(block.downsamplers or ())
    return _give((empty, (empty,) * skips))


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _like(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value,)
