"""Form one effective weight from a pristine weight and any number of changes.

    W' = round(W + sum_i scale_i * delta_i),    delta_i dense, sparse, or up_i @ down_i

The sum is accumulated once in fp32 and rounded once to the weight's dtype. Adding to rounded weights one
change at a time, or subtracting a change again, drifts; forming the sum anew from pristine bits does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    return merged(weight, deltas, scales, out=out)


def merged(
    weight: Tensor, deltas: Sequence[Delta], scales: Sequence[float], *, out: Tensor | None = None
) -> Tensor:
    """Return what merge_bank returns, for callers that know that everything fits: nothing is checked.

    The checks of a small layer take longer than its sum, those of sparse indices make a GPU's host wait.
    """
    weight = weight.detach()
    active = [(delta, scale) for delta, scale in zip(deltas, scales, strict=True) if scale != 0]
    out = torch.empty_like(weight) if out is None else out.detach()
    if not active or not weight.numel():
        # Not by way of the accumulator: a copy keeps NaN payloads and signed zeros.
        return out.copy_(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    inside = out.dtype == wide and out.is_contiguous()
    total = out if inside else torch.empty(weight.shape, dtype=wide, device=weight.device)
    pairs = [(*delta, scale) for delta, scale in active if isinstance(delta, tuple) and delta[0].shape[0]]
    _start(total, weight, pairs)
    for delta, scale in active:
        if isinstance(delta, Tensor):
            total.add_(_wide(delta, total).reshape(total.shape), alpha=scale)
        elif isinstance(delta, Sparse):
            total.view(-1).index_add_(0, delta.indices.to(total.device), _wide(delta.values, total) * scale)
    return total if inside else out.copy_(total)


def _start(total: Tensor, weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """Set ``total`` to the weight plus all low-rank changes, whose products are one matrix product."""
    if not pairs:
        total.copy_(weight)
        return
    downs, ups, scales = zip(*pairs, strict=True)
    down, up = (_wide(_joined(parts, axis), total) for parts, axis in ((downs, 0), (ups, 1)))
    alpha = scales[0]
    if len(pairs) > 1:
        alpha = 1.0
        up.mul_(_columns(scales, tuple([len(down) for down in downs]), up.dtype, up.device))
    rows = total.view(total.shape[0], -1)
    # The weight is widened before the sum where it is narrower; where not, it is read once.
    if weight.dtype != total.dtype or not weight.is_contiguous():
        weight = total.copy_(weight)
    # Contiguous: matrix products sum in another order for other strides.
    torch.addmm(weight.view_as(rows), up.contiguous(), down.contiguous(), alpha=alpha, out=rows)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Return the factors as one matrix, joined where the first lies: one transfer to a GPU, not many."""
    matrices = [part if part.ndim == 2 else part.flatten(1) for part in parts]
    if len(matrices) == 1:
        return matrices[0]
    return torch.cat([matrix.to(matrices[0].device) for matrix in matrices], axis)


@lru_cache(maxsize=64)
def _columns(
    scales: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return each change's scale as often as its rank; the layers of a model have mostly the same."""
    counts = torch.tensor(ranks)
    return torch.tensor(scales, dtype=dtype).repeat_interleave(counts).to(device)


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
