"""Form one effective weight from a pristine weight and any number of changes.

    W' = round(W + sum_i scale_i * delta_i),    delta_i dense, sparse, or up_i @ down_i

The sum is accumulated once in fp32 and rounded once to the weight's dtype. Adding to rounded weights one
change at a time, or subtracting a change again, drifts; forming the sum anew from pristine bits does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """A change of some entries only; the others keep every bit.

    Attributes:
        indices: Positions in the flattened weight (row-major), int32 or int64 ``[n]``, none twice.
        values: What is added there, floating ``[n]``.
    """

    indices: Tensor
    values: Tensor


Delta = Tensor | tuple[Tensor, Tensor] | Sparse


def merge_bank(
    weight: Tensor, deltas: Sequence[Delta], scales: Sequence[float], *, out: Tensor | None = None
) -> Tensor:
    """Return ``weight + sum(scale * delta)`` in the weight's dtype, rounded once.

    Args:
        weight: Pristine weight ``[out, in...]`` of any strides; fp16, bf16, fp32 (or fp64, then summed in
            fp64). Never written to.
        deltas: Dense changes of the weight's shape, sparse ones, or low-rank pairs ``(down [r, in...], up
            [out, r, 1...])``; the kernel axes of a convolution belong to ``down``. Any floating dtype and
            device.
        scales: One finite factor per change. A factor of 0 leaves out its change, bit for bit.
        out: Where to put the result; of the weight's shape, dtype and device, sharing memory with no input.

    Raises:
        ValueError: If counts, shapes, dtypes or devices do not fit, a scale is not finite, or ``out``
            overlaps an input.
    """
    _check(weight, deltas, scales, out)
    weight = weight.detach()
    active = [(delta, scale) for delta, scale in zip(deltas, scales, strict=True) if scale != 0]
    if not active:
        # Not by way of the accumulator: a copy keeps NaN payloads and signed zeros.
        return weight.clone() if out is None else out.detach().copy_(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide, copy=True, memory_format=torch.contiguous_format)
    rows = total.view(weight.shape[0] if weight.ndim else 1, -1) if total.numel() else total.view(0, 0)
    for delta, scale in active:
        if isinstance(delta, Tensor):
            total.add_(_wide(delta, total).reshape(total.shape), alpha=scale)
        elif isinstance(delta, Sparse):
            total.view(-1).index_add_(0, delta.indices.to(total.device), _wide(delta.values, total) * scale)
        elif total.numel() and delta[0].shape[0]:
            # Contiguous: matrix products sum in another order for other strides.
            down, up = (_wide(factor, total).contiguous() for factor in delta)
            rows.addmm_(up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1), alpha=scale)
    return total.to(weight.dtype) if out is None else out.detach().copy_(total)


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(device=like.device, dtype=like.dtype)


def _check(weight: Tensor, deltas: Sequence[Delta], scales: Sequence[float], out: Tensor | None) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"weight must be of a floating dtype, got {weight.dtype}")
    if len(deltas) != len(scales):
        raise ValueError(f"one scale per delta is wanted, got {len(scales)} for {len(deltas)}")
    for number, (delta, scale) in enumerate(zip(deltas, scales, strict=True)):
        if not math.isfinite(scale):
            raise ValueError(f"scale {number} must be finite, got {scale}")
        if not _fits(weight, delta):
            shapes = " and ".join(str(tuple(part.shape)) for part in _parts(delta))
            raise ValueError(f"delta {number} of shape {shapes} does not fit weight {tuple(weight.shape)}")
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"out must be {tuple(weight.shape)} {weight.dtype} on {weight.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    inputs = [weight]
    for delta in deltas:
        inputs += _parts(delta)
    if any(_overlap(out, tensor) for tensor in inputs):
        raise ValueError("out shares memory with an input")


def _parts(delta: Delta) -> Sequence[Tensor]:
    if isinstance(delta, Tensor):
        return (delta,)
    return (delta.indices, delta.values) if isinstance(delta, Sparse) else delta


def _fits(weight: Tensor, delta: Delta) -> bool:
    if isinstance(delta, Tensor):
        # A linear layer's change fits a 1x1 convolution and the other way round.
        return _squeezed(delta.shape) == _squeezed(weight.shape)
    if isinstance(delta, Sparse):
        return _addresses(delta, weight.numel())
    down, up = delta
    if weight.ndim < 2 or down.ndim < 2 or up.ndim < 2 or any(side != 1 for side in up.shape[2:]):
        return False
    inner = _squeezed(down.shape[1:]) == _squeezed(weight.shape[1:])
    return inner and up.shape[0] == weight.shape[0] and up.shape[1] == down.shape[0]


def _addresses(delta: Sparse, count: int) -> bool:
    """Say whether a sparse change has a value for each index, and no index beyond ``count`` entries."""
    indices = delta.indices
    if indices.ndim != 1 or indices.shape != delta.values.shape:
        return False
    if not indices.numel():
        return True
    first, last = (int(bound) for bound in indices.aminmax())
    return first >= 0 and last < count


def _squeezed(shape: Sequence[int]) -> list[int]:
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return sides


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start_a, end_a), (start_b, end_b) = _span(a), _span(b)
    return start_a < end_b and start_b < end_a


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((side - 1) * stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
