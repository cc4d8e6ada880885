"""SaRA's low-rank term: the nuclear norm of what is trained, one matrix at a time."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from studio.data.batches import derived_seed
from studio.trainers.sparse_parameters import SparseParameters

LEAST_SIDE = 32
"""Matrices with a shorter side are left out: their rank is low anyway."""


BLOCK = 4096
"""Columns that are turned to fp64 at a time."""


def nuclear_norm_gradient(matrix: Tensor) -> Tensor:
    """Return the gradient ``[m, n]`` of the sum of singular values of a matrix ``[m, n]``, fp32.

    It is ``U V^T`` over the singular values above zero (to rounding), which is the subgradient of least norm
    where some are zero. It is formed as ``(M M^T)^(-1/2) M``, M lying: flattened convolutions are up to 27
    times as long as high, and a singular value decomposition would pay for all of the length.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return nuclear_norm_gradient(matrix.T).T
    # Squares of singular values need twice the digits; Metal has no fp64.
    device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=device)
    for block in matrix.split(BLOCK, dim=1):
        precise = block.to(device, torch.float64)
        gram.addmm_(precise, precise.T)
    squares, left = torch.linalg.eigh(gram)
    values = squares.clamp(min=0).sqrt()
    least = values[-1] * matrix.shape[1] * torch.finfo(matrix.dtype).eps
    inverse = torch.where(values > least, values.reciprocal(), 0.0)
    root: Tensor = (left * inverse) @ left.T
    return root.to(matrix) @ matrix


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
        tables: Weights that are looked up and not multiplied with: left out, for their rows are many and the
            term would move those of words that no caption has.
    """

    def __init__(
        self,
        parts: Sequence[SparseParameters],
        *,
        weight: float,
        of: Literal["parameter", "delta"],
        every: int,
        seed: int,
        tables: Iterable[Tensor] = (),
    ) -> None:
        self._weight, self._of, self._every, self._seed = weight, of, every, seed
        skipped = {id(table) for table in tables}
        self._matrices = [
            (part, number)
            for part in parts
            for number, tensor in enumerate(part.plan.weights)
            if id(tensor) not in skipped
            and tensor.ndim > 1
            and min(tensor.shape[0], tensor.numel() // tensor.shape[0]) >= LEAST_SIDE
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
