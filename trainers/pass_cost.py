"""What forward and backward passes take in memory and time, told before the first of them.

All that autograd keeps and all that is computed is a polynomial of the number of latents: a straight line,
and a parabola where attention holds all its scores. So forward passes over a few small pictures, of the
networks as they are set up for the run, say it for any size.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from studio.models.shadow import shadowed

Pass = Callable[[int, int], Any]
"""A forward pass for a height and a width in latents; its result keeps what a backward pass needs."""
SMALL = ((8, 8), (8, 16), (8, 24))
"""Sizes of the small pictures: sides that UNets can halve three times."""
BEND = 0.005
"""Share of a number by which it must leave a straight line to be taken for a parabola's."""


@dataclass(frozen=True)
class Work:
    """What a pass does, and the backward pass after it.

    Attributes:
        memory: Bytes held at once beside parameters and their gradients, at the most.
        flops: Arithmetic of matrix products and convolutions.
        traffic: Bytes that all operations read and write.
    """

    memory: float
    flops: float
    traffic: float


@dataclass(frozen=True)
class Speed:
    """Of a device.

    Attributes:
        flops: Of matrix products and convolutions, in a second.
        traffic: Bytes that are read and written, in a second.
    """

    flops: float
    traffic: float

    def seconds(self, work: Work) -> float:
        """Return how long the device works."""
        return work.flops / self.flops + work.traffic / self.traffic


class Tally(TorchDispatchMode):
    """Counts what operations do while its context is open, and changes nothing of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = self._peak = self._block = 0
        self._flops = self._traffic = 0
        self._there: dict[int, Any] = {}
        self._again = False

    @property
    def work(self) -> Work:
        """What was counted."""
        return Work(max(self._peak, self._held + self._block), self._flops, self._traffic)

    def again(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Count what the backward pass computes once more, and what that holds while it lasts."""
        held, peak, self._again = self._held, self._peak, True
        result = function(*args, **kwargs)
        self._block = max(self._block, self._held - held)
        del result
        self._peak, self._again = peak, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = _kind(func)
        if kind.looks:
            return out
        made = [value for value in _flat((out,)) if isinstance(value, Tensor)]
        if kind.makes:
            for tensor in made:
                self._note(tensor)
        read = [value for value in _flat(args) if isinstance(value, Tensor)]
        # The gradient of each operand takes as much again; in what is done once more there is none.
        times = 1 if self._again else 1 + sum(value.requires_grad for value in read if value.dim() > 1)
        if kind.flops is not None:
            self._flops += times * kind.flops(*args, **(kwargs or {}), out_val=out)
        self._traffic += times * sum(value.nbytes for value in (*read, *made))
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._there:
            return

        def gone(_: Any) -> None:
            del self._there[key]
            self._held -= size

        self._there[key] = weakref.ref(storage, gone)
        self._held += size
        self._peak = max(self._peak, self._held)


def training_pass(
    run: Pass, size: tuple[int, int], *, parts: Sequence[nn.Module], speed: Speed, device: torch.device
) -> tuple[int, float]:
    """Return the bytes that a forward and a backward pass hold beside parameters, and their seconds.

    Args:
        run: The forward pass.
        size: Height and width of the picture in latents.
        parts: Networks in it, of which some may compute blocks again in the backward pass.
        speed: Of the device.
        device: Where it runs.
    """
    latents = math.prod(size)
    sizes: Sequence[tuple[int, int]] = [size] if latents <= sum(map(math.prod, SMALL)) else SMALL
    if len(sizes) > 1:
        # What is done only once must not be multiplied.
        run(*sizes[0])
    found = [(math.prod(one), _work(run, one, parts)) for one in sizes]
    work = Work(
        *(
            _extended([(place, getattr(one, name)) for place, one in found], latents)
            for name in ("memory", "flops", "traffic")
        )
    )
    # What operations cost of themselves, however small the picture.
    again = any(
        getattr(module, "gradient_checkpointing", False) for part in parts for module in part.modules()
    )
    own = max(0.0, (2 + again) * _seconds(run, sizes[0], device) - speed.seconds(found[0][1]))
    busy = speed.seconds(work)
    # A GPU works while the CPU prepares its next operations.
    return int(work.memory), own + busy if device.type == "cpu" else max(own, busy)


def encoding_pass(run: Pass, size: tuple[int, int], *, speed: Speed) -> tuple[int, float]:
    """Return the bytes that a pass without gradients holds, and its seconds: in proportion to the picture.

    Args:
        run: The pass.
        size: Height and width of the picture in latents.
        speed: Of the device.
    """
    small = min(size, SMALL[0], key=math.prod)
    work = _work(run, small, ())
    scale = math.prod(size) / math.prod(small)
    return int(scale * work.memory), scale * speed.seconds(work)


@cache
def measured_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Return the speed of a device in a number type, by a product, a convolution and a sum of some size."""
    big = device.type != "cpu"
    side, channels, numbers = (4096, 320, 2**26) if big else (512, 64, 2**24)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    left, pixels, weight = ones(side, side), ones(1, channels, 64, 64), ones(channels, channels, 3, 3)
    flops = 2 * side**3 + 2 * 64 * 64 * 9 * channels**2
    taken = min(
        _taken(lambda: (left @ left, torch.conv2d(pixels, weight, padding=1)), device) for _ in range(3)
    )
    # Into memory that is new, as passes do, and that no cache holds.
    row = ones(numbers)
    added = min(_taken(lambda: row + row, device) for _ in range(3))
    return Speed(flops / taken, 3 * row.nbytes / added)


def _work(run: Pass, size: tuple[int, int], parts: Sequence[nn.Module]) -> Work:
    tally = Tally()
    with tally, _blocks_again(parts, tally):
        # Kept until all is counted.
        result = run(*size)
    work = tally.work
    del result
    return work


@contextmanager
def _blocks_again(parts: Sequence[nn.Module], tally: Tally) -> Iterator[None]:
    """Have blocks that are computed again in the backward pass counted as such."""
    name = "_gradient_checkpointing_func"

    def counting(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tally.again(function, *args, **kwargs)
            return checkpoint(function, *args, **kwargs)

        return run

    with ExitStack() as stack:
        for part in parts:
            for module in part.modules():
                if name in vars(module):
                    stack.enter_context(shadowed(module, {name: counting(vars(module)[name])}))
        yield


def _seconds(run: Pass, size: tuple[int, int], device: torch.device) -> float:
    return _taken(lambda: run(*size), device)


def _taken(work: Callable[[], Any], device: torch.device) -> float:
    wait = torch.get_device_module(device).synchronize
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _extended(points: Sequence[tuple[int, float]], place: int) -> float:
    """Return what a polynomial through points, in even steps where there are three, is elsewhere."""
    if len(points) == 3:
        first, middle, last = (value for _, value in points)
        if abs(first - 2 * middle + last) <= BEND * last:
            points = points[::2]
    return sum(
        value * math.prod((place - other) / (own - other) for other, _ in points if other != own)
        for own, value in points
    )


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


class _Kind(NamedTuple):
    """What an operation is.

    Attributes:
        looks: Whether it only gives another view of what is there.
        makes: Whether what it returns takes memory of its own.
        flops: Counts its arithmetic, or None.
    """

    looks: bool
    makes: bool
    flops: Callable[..., int] | None


@cache
def _kind(func: Any) -> _Kind:
    aliases = [one.alias_info for one in func._schema.returns]
    formula = flop_registry.get(func._overloadpacket)
    if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        # torch has a formula for those of GPUs only.
        formula = _attention_flops
    looks = all(alias is not None and not alias.is_write for alias in aliases)
    return _Kind(looks, not any(aliases), formula)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))
