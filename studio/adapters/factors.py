"""Arithmetic on products of two thin factors, without the matrix that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.merger import Factors, Layer

if TYPE_CHECKING:
    from studio.adapters.merger import Target


def weighted_sum(layer: Layer) -> Factors | Tensor:
    """Return the sum of all terms: a product of as many columns as all have if all are products.

    ``sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]``
    """
    factors = [term.factors() for term in layer.terms]
    thin = [pair for pair in factors if pair is not None]
    if len(thin) == len(factors):
        return Factors(torch.cat([pair.up for pair in thin], 1), torch.cat([pair.down for pair in thin], 0))
    total = layer.delta(layer.terms[0])
    for term in layer.terms[1:]:
        total += layer.delta(term)
    return total


def sparse_sum(layer: Layer) -> SparseChange | None:
    """Return the sum of terms that are all sparse, with the entries of any of them; None for others."""
    changes = [term.change for term in layer.terms if isinstance(term.change, SparseChange)]
    if len(changes) < len(layer.terms):
        return None
    places = torch.cat([change.indices.cpu() for change in changes])
    indices, where = places.unique(return_inverse=True)
    values = torch.zeros(len(indices))
    scaled = [
        term.weight * change.values.cpu().float() for term, change in zip(layer.terms, changes, strict=True)
    ]
    return SparseChange(indices, values.index_add_(0, where, torch.cat(scaled)), layer.shape)


def truncated(target: Factors | Tensor, rank: int) -> tuple[Factors, Tensor]:
    """Return the nearest product of at most that rank and all singular values.

    Nearest in the Frobenius norm (Eckart and Young 1936). The two factors' columns and rows are orthogonal,
    and each column is as long as its row, the root of the singular value. A product is decomposed by QR of
    both factors and the SVD of the small product of their triangles; a matrix by the eigenvectors of its
    shorter side's Gram matrix, an eighth of the work of decomposing a wide kernel. All in fp64.

    Args:
        target: A product, or a weight's change ``[out, in...]``.
        rank: More than there are singular values means all.

    Returns:
        The factors, fp32, and the singular values, fp64, descending.
    """
    if isinstance(target, Factors):
        (left, up), (right, down) = (torch.linalg.qr(side) for side in _sides(target))
        rows, values, columns = torch.linalg.svd(up @ down.T, full_matrices=False)
        lengths = values[:rank].sqrt()
        return _single(
            (left @ rows[:, :rank]) * lengths, (columns[:rank] @ right.T) * lengths[:, None]
        ), values
    flat = target.flatten(1).double()
    tall = flat.shape[0] > flat.shape[1]
    side = flat.T if tall else flat
    # Ascending eigenvalues, those of nothing below zero by rounding.
    squares, vectors = torch.linalg.eigh(side @ side.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    leading = vectors.flip(1)[:, :rank]
    lengths = values[:rank].sqrt().where(values[:rank] > 0, 1.0)
    near, far = leading * lengths, (leading.T @ side) / lengths[:, None]
    return (_single(far.T, near.T) if tall else _single(near, far)), values


def singular_values(target: Factors | Tensor) -> Tensor:
    """Return all singular values of a product or a weight's change, fp64, descending."""
    if isinstance(target, Factors):
        up, down = (torch.linalg.qr(side, mode="r").R for side in _sides(target))
        values: Tensor = torch.linalg.svdvals(up @ down.T)
        return values
    flat = target.flatten(1).double()
    side = flat.T if flat.shape[0] > flat.shape[1] else flat
    squares: Tensor = torch.linalg.eigvalsh(side @ side.T)
    return squares.flip(0).clamp_min(0).sqrt()


def norm(target: Target) -> float:
    """Return the Frobenius norm."""
    if isinstance(target, SparseChange):
        return float(target.values.double().norm())
    if isinstance(target, Factors):
        up, down = (side.T @ side for side in _sides(target))
        return float((up * down).sum().clamp_min(0).sqrt())
    return float(torch.linalg.vector_norm(target, dtype=torch.float64))


def as_lora(factors: Factors, shape: tuple[int, ...]) -> LoraChange:
    """Return a product as the change of a weight of that shape; its alpha is the rank, a factor of 1."""
    ones = (1 for _ in shape[2:])
    down = factors.down.reshape(factors.rank, *shape[1:])
    return LoraChange(down, factors.up.reshape(*factors.up.shape, *ones), float(factors.rank))


def in_full(target: Target) -> Tensor:
    """Return the matrix or vector, fp32; of a product ``[out, in * kh * kw]``."""
    if isinstance(target, Factors):
        return target.up @ target.down
    if isinstance(target, SparseChange):
        return target.delta(torch.empty(target.shape), weight=1.0)
    return target


def _sides(target: Factors) -> tuple[Tensor, Tensor]:
    """Return both factors upright: ``[out, rank]`` and ``[in, rank]``, fp64."""
    return target.up.double(), target.down.double().T


def _single(up: Tensor, down: Tensor) -> Factors:
    return Factors(up.float().contiguous(), down.float().contiguous())
