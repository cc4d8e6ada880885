"""Low-rank changes of one layer beside its weight, for each sample of a batch its own.

    y[b] <- y[b] + (x[b] A[i_b]^T) B[i_b]^T,    i_b = -1: nothing is added

i is the branch of each sample; A[i] and B[i] are the joined factors of the branch's changes with their scales
folded into B, as in ``lora_stacked``. Ranks may differ between branches: shorter factors are filled up with
zeros, and the Triton kernel reads none of these. The index lies on the device, so nobody waits for it, and a
CUDA graph can be given another one in place.

Punica, arXiv:2310.18547, Sec. 4 (SGMV); S-LoRA, arXiv:2311.03285, Sec. 5.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.kernels.lora_stacked import (
    Pair,
    Stacked,
    check_inputs,
    check_pairs,
    fill,
    fold,
    lora_stacked_conv,
)

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True, eq=False)
class IndexedStack:
    """Joined factors of a layer's changes for each of n branches. Made by ``stack_indexed``.

    Attributes:
        down: ``A``, ``[n + 1, R, in...]``, R the greatest sum of ranks; zeros beyond a branch's own and in
            the last entry, which is the one that -1 means.
        up: ``(diag(s) B)^T``, ``[n + 1, R, out]``, likewise.
        sizes: Sum of ranks of each branch, n numbers.
        ranks: The same and 0 on the device: int32 ``[n + 1]``.
        folded: Rows of ``up`` of each change, branch after branch: views.
        plain: The same at scale 1.
    """

    down: Tensor
    up: Tensor
    sizes: tuple[int, ...]
    ranks: Tensor
    folded: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which branch each sample of a batch is of. Made by ``rows_of``, once for any number of layers.

    Attributes:
        index: Branch of each sample, -1 for none: int64 ``[B]``.
        group: Samples per branch where all branches stand side by side in order, as many of each; else None.
    """

    index: Tensor
    group: int | None


def rows_of(rows: Sequence[int], num_branches: int, *, device: torch.device) -> Rows:
    """Put the branch of each sample on a device.

    Raises:
        ValueError: If there is no such branch.
    """
    if any(not -1 <= row < num_branches for row in rows):
        raise ValueError(f"rows must name branches 0 to {num_branches - 1}, or -1 for none, got {list(rows)}")
    group, rest = divmod(len(rows), num_branches or 1)
    in_order = (
        bool(rows) and not rest and list(rows) == [i for i in range(num_branches) for _ in range(group)]
    )
    return Rows(torch.tensor(list(rows), dtype=torch.int64, device=device), group if in_order else None)


def stack_indexed(
    branches: Sequence[Sequence[Pair]],
    scales: Sequence[Sequence[float]],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> IndexedStack:
    """Join the factors of each branch's changes of one layer and fold the scales in.

    Args:
        branches: For each branch the factors of its changes, maybe none; at least one in all.
        scales: For each branch one per change.
        device: Of the layer's inputs.
        dtype: Of the layer's inputs.

    Raises:
        ValueError: If the factors do not fit each other or the number of scales.
    """
    out, inner = check_pairs(branches, scales)
    ranks = [sum(down.shape[0] for down, _ in pairs) for pairs in branches]
    shape = len(branches) + 1, max(ranks)
    down = torch.zeros((*shape, *inner), device=device, dtype=dtype)
    up, source = (torch.zeros((*shape, out), device=device, dtype=dtype) for _ in range(2))
    filled = [fill(down[i], up[i], source[i], pairs) for i, pairs in enumerate(branches)]
    folded, plain = (tuple(chain(*parts)) for parts in zip(*filled, strict=True))
    fold(folded, plain, list(chain(*scales)))
    on_device = torch.tensor([*ranks, 0], dtype=torch.int32, device=device)
    return IndexedStack(down, up, tuple(ranks), on_device, folded, plain)


def why_not_triton(x: Tensor, y: Tensor) -> str | None:
    """Return why the Triton kernel does not apply to an input and output, or None if it does."""
    if not (x.is_cuda and y.is_cuda) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the activations lie on {x.device}, the kernel runs on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the activations are {x.dtype}, the kernel takes fp32, fp16 and bf16"
    if not _foldable(y):
        return f"y {tuple(y.shape)} of strides {y.stride()} cannot be written to as [B, tokens, out]"
    return None


def lora_indexed(
    x: Tensor, y: Tensor, stack: IndexedStack, rows: Rows, *, backend: Backend = "auto"
) -> Tensor:
    """Add each sample's changes of a linear layer to what the layer gave.

    Args:
        x: The layer's input ``[B, ..., in]``.
        y: The layer's output ``[B, ..., out]``, written to.
        stack: Of the same dtype and device.
        rows: Of the same device and batch.
        backend: "auto" takes two batched products where the samples are sorted into equal groups, which no
            kernel beats, else Triton where it applies, else the torch reference, which gathers each
            sample's factors.

    Returns:
        ``y`` itself.

    Raises:
        ValueError: If shapes or dtypes do not fit, or Triton is asked for where it does not apply.
    """
    down, up = stack.down, stack.up
    fits = x.shape[0] == len(rows.index) and x.shape[-1:] == down.shape[2:]
    check_inputs(x, y, down, fits and y.shape == (*x.shape[:-1], up.shape[2]))
    if backend == "triton" or (backend == "auto" and rows.group is None):
        reason = why_not_triton(x, y)
        if reason is None:
            from studio.kernels.lora_indexed_triton import launch

            launch(x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]), _folded(y), stack, rows.index)
            return y
        if backend == "triton":
            raise ValueError(f"backend 'triton' does not apply: {reason}. Use backend='auto'.")
    sorted_in = rows.group is not None and len(rows.index) == rows.group * len(stack.sizes)
    down, up = (part[:-1] if sorted_in else part[rows.index] for part in (down, up))
    tokens = math.prod(x.shape[:-1]) // (len(down) or 1)
    inner = torch.bmm(x.reshape(len(down), tokens, x.shape[-1]), down.mT)
    if y.is_contiguous():
        y.view(len(up), tokens, y.shape[-1]).baddbmm_(inner, up)
        return y
    return y.add_(torch.bmm(inner, up).view(y.shape))


def lora_indexed_conv(
    x: Tensor,
    y: Tensor,
    stack: IndexedStack,
    rows: Rows,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Add each sample's changes of a convolution to what it gave.

    Samples that are sorted into equal groups take one ``lora_stacked_conv`` for each branch with changes;
    others one convolution in which each sample is a group of its own, with its own factors.

    Args:
        x: The layer's input ``[B, in, H, W]``.
        y: The layer's output ``[B, out, H', W']``, written to.
        stack: Of the same dtype and device.
        rows: Of the same device and batch.
        stride, padding, dilation, groups: The layer's, as torch.nn.Conv2d has them.

    Returns:
        ``y`` itself.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    batch, out = len(rows.index), stack.up.shape[2]
    fits = x.ndim == 4 and x.shape[1] == groups * stack.down.shape[2] and y.shape[:2] == (batch, out)
    check_inputs(x, y, stack.down, fits and len(x) == batch)
    if rows.group is not None and batch == rows.group * len(stack.sizes):
        for i, rank in enumerate(stack.sizes):
            if rank:
                one = Stacked(stack.down[i, :rank], stack.up[i, :rank], (), ())
                part = slice(i * rows.group, (i + 1) * rows.group)
                lora_stacked_conv(
                    x[part], y[part], one, stride=stride, padding=padding, dilation=dilation, groups=groups
                )
        return y
    if not y.numel():
        return y
    down, up = stack.down[rows.index], stack.up[rows.index]
    down = down.repeat(1, groups, 1, 1, 1).flatten(0, 1)
    one_sample = x.reshape(1, -1, *x.shape[2:])
    inner = F.conv2d(one_sample, down, None, stride, padding, dilation, batch * groups)
    check_inputs(x, y, stack.down, inner.shape[2:] == y.shape[2:])
    if groups == 1 and y.is_contiguous():
        y.view(batch, out, -1).baddbmm_(up.mT, inner.view(batch, up.shape[1], -1))
        return y
    wide = up.mT.reshape(batch * out, up.shape[1], 1, 1)
    return y.add_(F.conv2d(inner, wide, groups=batch * groups).view(y.shape))


def _foldable(y: Tensor) -> bool:
    return 2 <= y.ndim <= 3 or y.is_contiguous()


def _folded(y: Tensor) -> Tensor:
    """Return a view ``[B, tokens, out]``."""
    return y.unsqueeze(1) if y.ndim == 2 else y.view(y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1])
