"""Tensors kept for a next time within a stated amount of memory: the least recently used go first."""

from collections import OrderedDict

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

# What a run needs for activations: this share of a device's memory stays free.
FREE_SHARE = 0.25


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of a device can be filled, and how many it has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What PyTorch holds ready for its next tensors counts as used there.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    # MPS has the machine's own memory.
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def spare_memory(device: torch.device) -> int:
    """Return how many bytes of a device can be filled so that its share for activations stays free."""
    free, total = free_memory(device)
    return max(0, int(free - FREE_SHARE * total))


class Keepable:
    """Something with a tensor that can be made again. The tensor is None while it is not kept."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class Resident:
    """The tensors of some keepables, of ``budget`` bytes together at most.

    What is in use is not forgotten: ``lend`` takes it out of the queue and ``returned`` puts it back.

    Args:
        budget: In bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._lent = 0
        self._idle: OrderedDict[Keepable, None] = OrderedDict()

    def room_for(self, like: Tensor) -> Tensor | None:
        """Forget until a tensor like that can be added, and return memory for it, not initialised.

        Returns:
            None if it does not fit beside what is in use; nothing is forgotten then.
        """
        if self._lent + like.nbytes > self.budget:
            return None
        memory: Tensor | None = None
        while self.nbytes + like.nbytes > self.budget:
            memory = self.forget(next(iter(self._idle)))
        return memory if memory is not None and _alike(memory, like) else torch.empty_like(like)

    def add(self, kept: Keepable, tensor: Tensor) -> None:
        """Keep a tensor for which there is room; it is not in use."""
        kept.tensor = tensor
        self.nbytes += tensor.nbytes
        self._idle[kept] = None

    def lend(self, kept: Keepable) -> None:
        """Take a kept tensor into use."""
        assert kept.tensor is not None
        del self._idle[kept]
        self._lent += kept.tensor.nbytes

    def returned(self, kept: Keepable) -> None:
        """Note that a tensor was in use until now."""
        assert kept.tensor is not None
        self._idle[kept] = None
        self._lent -= kept.tensor.nbytes

    def used(self, kept: Keepable) -> None:
        """Note that a kept tensor was used just now, and is in use no more."""
        self._idle.move_to_end(kept)

    def forget(self, kept: Keepable) -> Tensor:
        """Drop a kept tensor that is not in use, and return it."""
        del self._idle[kept]
        tensor, kept.tensor = kept.tensor, None
        assert tensor is not None
        self.nbytes -= tensor.nbytes
        return tensor


def _alike(one: Tensor, other: Tensor) -> bool:
    facts = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in (one, other)]
    return facts[0] == facts[1]
