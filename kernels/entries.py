"""Where the entries of a tensor lie in memory, from their row-major positions.

Entry i of a tensor of any strides lies ``sum_k coordinate_k(i) stride_k`` places behind its first one. What
is written there is written in place; ``reshape(-1)`` of a tensor that is not contiguous is a copy.
"""

import torch
from torch import Tensor

MOST_ENTRIES = 2**31
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def axes(dense: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each axis, with axes joined that memory does not tell apart."""
    joined: list[tuple[int, int]] = []
    for size, stride in zip(dense.shape, dense.stride(), strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined


def memory(dense: Tensor) -> Tensor:
    """Return the memory that a tensor spans as a vector of integers that shares it.

    An indexed write of integers touches no other entry. That of 16-bit floats, on the CPU, passes the whole
    vector through fp32, which takes memory for all of it and changes the bits of a NaN.
    """
    integers = dense.detach().view(INTEGERS[dense.element_size()])
    if dense.is_contiguous():
        return integers.view(-1)
    reach = sum((size - 1) * stride for size, stride in axes(dense))
    return integers.as_strided((reach + 1,), (1,))


def places(dense: Tensor, indices: Tensor) -> Tensor:
    """Return where entries lie in ``memory(dense)``: int64, or the indices themselves if that is there."""
    if dense.is_contiguous():
        return indices
    (_, outer), *inner = axes(dense)
    found, rest = torch.zeros_like(indices, dtype=torch.int64), indices
    for size, stride in reversed(inner):
        found.add_(rest.remainder(size).long().mul_(stride))
        rest = rest.div(size, rounding_mode="floor")
    return found.add_(rest.long().mul_(outer))


def check_indices(dense: Tensor, indices: Tensor, *, name: str) -> None:
    """Check that a vector is of the kind that can name entries of this tensor.

    Raises:
        ValueError: If it is not, or the tensor is too large for int32 or not of a floating dtype.
    """
    if not dense.is_floating_point():
        raise ValueError(f"{name} must belong to a tensor of a floating dtype, got {dense.dtype}")
    if dense.numel() > MOST_ENTRIES:
        raise ValueError(
            f"{name} are int32 and reach 2**31 entries, their tensor {tuple(dense.shape)} has more: "
            f"{dense.numel()}. Split it into views along its first axis."
        )
    if indices.dtype != torch.int32 or indices.ndim != 1:
        raise ValueError(
            f"{name} must be an int32 vector, got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.device != dense.device:
        raise ValueError(f"{name} lie on {indices.device}, their tensor on {dense.device}. Move one of them.")


def check_bounds(dense: Tensor, low: int, high: int, *, name: str) -> None:
    """Check the least and the greatest position.

    Raises:
        ValueError: If one of them is outside the tensor.
    """
    if low < 0 or high >= dense.numel():
        raise ValueError(f"{name} must lie in 0 to {dense.numel() - 1}, got {low} to {high}")


def check_apart(dense: Tensor, *, name: str) -> None:
    """Check that no two entries share memory.

    Raises:
        ValueError: If two do, or the strides do not rule it out.
    """
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in axes(dense)):
        if stride <= reach:
            raise ValueError(
                f"entries of {name} share memory: shape {tuple(dense.shape)}, strides {dense.stride()}. "
                "Clone it first."
            )
        reach += stride * (size - 1)
