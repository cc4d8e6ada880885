"""SaRA's low-rank term: the nuclear norm of what is trained, one matrix at a time."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from studio.data.batches import derived_seed
from studio.trainers.sparse_parameters import SparseParameters

LEAST_SIDE = 32
"""Matrices with a shorter side are left out: their rank is low anyway."""


def nuclear_norm_gradient(matrix: Tensor) -> Tensor:
    """Return the gradient ``[m, n]`` of the sum of singular values of a matrix ``[m, n]``, fp32.

    It is ``U V^T`` over the singular values above zero (to rounding), which is the subgradient of least norm
    where some are zero.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    least = values[:1] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    gradient: Tensor = (left * (values > least)) @ right
    return gradient


class RankTerm:
    """Adds the gradient of ``weight * ||P * M||_*`` to the trained entries of one matrix each few steps.

    Linear layers and, flattened to ``[out, in * height * width]``, convolutions take turns at random; which
    one depends on seed and step alone. SaRA, arXiv:2409.06633, Eq. 4-5. Differs from the paper's code:
    convolutions take part, and the term is part of the gradient that is clipped.

    Args:
        parts: What is trained.
        weight: Lambda.
        of: ``parameter`` (the paper's) for the trained values, ``delta`` for their change.
        every: Steps from one matrix to the next.
        seed: Of the choice.
    """

    def __init__(
        self,
        parts: Sequence[SparseParameters],
        *,
        weight: float,
        of: Literal["parameter", "delta"],
        every: int,
        seed: int,
    ) -> None:
        self._weight, self._of, self._every, self._seed = weight, of, every, seed
        self._matrices = [
            (part, number)
            for part in parts
            for number, tensor in enumerate(part.plan.weights)
            if tensor.ndim > 1 and min(tensor.shape[0], tensor.numel() // tensor.shape[0]) >= LEAST_SIDE
        ]

    def __len__(self) -> int:
        """Return how many matrices take turns."""
        return len(self._matrices)

    def add_gradient(self, step: int) -> None:
        """Add the term's gradient of optimizer step ``step``, counted from 1."""
        if (step - 1) % self._every:
            return
        part, number = self._matrices[derived_seed(self._seed, step, "rank term") % len(self._matrices)]
        gradient = nuclear_norm_gradient(part.matrix(number, of=self._of))
        part.add_gradient(number, self._weight * gradient)
