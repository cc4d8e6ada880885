"""Low-rank changes of one layer beside its weight, all of them in two operations.

    y <- y + sum_i s_i (x A_i^T) B_i^T = y + (x A^T) (diag(s) B)^T

A and B are the factors of all changes joined along the rank, and each change's scale s_i is folded into its
part of B once, so that the cost does not grow with the number of changes: one product, and one added into y.
For a convolution A^T is the joined ``down`` convolution and B a pointwise one.

LoRA, arXiv:2106.09685, Eq. 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Factors ``(down [r, in...], up [out, r, 1...])`` of a change at scale 1."""


@dataclass(frozen=True, eq=False)
class Stacked:
    """Joined factors of a layer's changes. Made by ``stack``; ``fold`` gives them other scales.

    Attributes:
        down: ``A``, ``[R, in...]``, R the sum of the ranks.
        up: ``(diag(s) B)^T``, ``[R, out]``.
        folded: Each change's rows of ``up``: views.
        plain: The same at scale 1.
    """

    down: Tensor
    up: Tensor
    folded: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]


def stack(
    pairs: Sequence[Pair], scales: Sequence[float], *, device: torch.device, dtype: torch.dtype
) -> Stacked:
    """Join the factors of a layer's changes, at least one, and fold the scales in.

    Args:
        pairs: Factors of each change, of any floating dtype and device.
        scales: One per change.
        device: Of the layer's inputs.
        dtype: Of the layer's inputs.

    Raises:
        ValueError: If the factors do not fit each other or the number of scales.
    """
    out, inner = check_pairs([pairs], [scales])
    total = sum(down.shape[0] for down, _ in pairs)
    down = torch.empty((total, *inner), device=device, dtype=dtype)
    up, source = (torch.empty((total, out), device=device, dtype=dtype) for _ in range(2))
    folded, plain = fill(down, up, source, pairs)
    fold(folded, plain, scales)
    return Stacked(down, up, folded, plain)


def fold(folded: Sequence[Tensor], plain: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Write scaled factors, of any number of layers, in two calls and without a wait for the device.

    Args:
        folded: What to write, see Stacked.
        plain: The same at scale 1.
        scales: One for each of them.
    """
    if folded:
        torch._foreach_copy_(list(folded), list(plain))
        torch._foreach_mul_(list(folded), list(scales))


def lora_stacked(x: Tensor, y: Tensor, stacked: Stacked) -> Tensor:
    """Add the changes of a linear layer to what it gave; two operations where ``y`` is contiguous.

    Args:
        x: The layer's input ``[..., in]``.
        y: The layer's output ``[..., out]``, written to.
        stacked: Of the same dtype and device.

    Returns:
        ``y`` itself.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    down, up = stacked.down, stacked.up
    check_inputs(x, y, down, x.shape[-1:] == down.shape[1:] and y.shape == (*x.shape[:-1], up.shape[1]))
    inner = x.reshape(-1, down.shape[1]) @ down.t()
    if y.is_contiguous():
        y.view(-1, up.shape[1]).addmm_(inner, up)
        return y
    return y.add_((inner @ up).view(y.shape))


def lora_stacked_conv(
    x: Tensor,
    y: Tensor,
    stacked: Stacked,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Add the changes of a convolution to what it gave.

    Two operations where ``y`` is contiguous, also in channels-last order, and ``groups`` is 1; three
    elsewhere, and one more for groups.

    Args:
        x: The layer's input ``[B, in, H, W]``.
        y: The layer's output ``[B, out, H', W']``, written to.
        stacked: Of the same dtype and device.
        stride, padding, dilation, groups: The layer's, as torch.nn.Conv2d has them.

    Returns:
        ``y`` itself.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    down, up = stacked.down, stacked.up
    rank, out = up.shape
    fits = x.ndim == 4 and x.shape[1] == groups * down.shape[1] and y.shape[:2] == (x.shape[0], out)
    check_inputs(x, y, down, fits)
    if groups > 1:
        # Every group of inputs meets the same factors, and gives its own group of outputs.
        down = down.repeat(groups, 1, 1, 1)
    inner = F.conv2d(x, down, None, stride, padding, dilation, groups)
    check_inputs(x, y, down, inner.shape[2:] == y.shape[2:])
    if groups == 1 and y.is_contiguous():
        wide = up.t().expand(y.shape[0], out, rank)
        y.view(y.shape[0], out, -1).baddbmm_(wide, inner.reshape(y.shape[0], rank, -1))
    elif groups == 1 and y.is_contiguous(memory_format=torch.channels_last):
        y.permute(0, 2, 3, 1).view(-1, out).addmm_(inner.permute(0, 2, 3, 1).reshape(-1, rank), up)
    else:
        y.add_(F.conv2d(inner, up.t()[..., None, None], groups=groups))
    return y


def fill(down: Tensor, up: Tensor, source: Tensor, pairs: Sequence[Pair]) -> tuple[tuple[Tensor, ...], ...]:
    """Write factors one after the other along the rank.

    Returns:
        Each change's rows of ``up``, and of ``source``, which hold the change at scale 1.
    """
    folded, plain, first = [], [], 0
    for one, other in pairs:
        rows = slice(first, first + one.shape[0])
        first = rows.stop
        down[rows] = one.reshape(one.shape[0], *down.shape[1:])
        source[rows] = other.reshape(other.shape[0], -1).t()
        folded.append(up[rows])
        plain.append(source[rows])
    return tuple(folded), tuple(plain)


def check_pairs(
    branches: Sequence[Sequence[Pair]], scales: Sequence[Sequence[float]]
) -> tuple[int, tuple[int, ...]]:
    """Return the number of outputs and the shape of an input that all changes have.

    Raises:
        ValueError: If there is none, they differ, the factors do not fit each other or their scales.
    """
    if [len(pairs) for pairs in branches] != [len(numbers) for numbers in scales]:
        raise ValueError("one scale per pair of factors is wanted")
    found: set[tuple[int, tuple[int, ...]]] = set()
    for down, up in (pair for pairs in branches for pair in pairs):
        if (
            down.ndim < 2
            or up.shape != (up.shape[0], down.shape[0], *up.shape[2:])
            or up[0].numel() != up.shape[1]
        ):
            raise ValueError(f"{tuple(down.shape)} and {tuple(up.shape)} are no factors of one change")
        found.add((up.shape[0], tuple(down.shape[1:])))
    if len(found) != 1:
        raise ValueError(f"factors of one layer are wanted, got {sorted(found) or 'none'}")
    return found.pop()


def check_inputs(x: Tensor, y: Tensor, down: Tensor, fits: bool) -> None:
    """Raise ValueError unless the shapes fit and the dtypes are one."""
    if not fits:
        raise ValueError(f"x {tuple(x.shape)}, y {tuple(y.shape)} and down {tuple(down.shape)} do not fit")
    if not x.dtype == y.dtype == down.dtype:
        raise ValueError(f"x, y and the factors must be of one dtype, got {x.dtype}, {y.dtype}, {down.dtype}")
