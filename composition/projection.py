"""Take directions out of prompt embeddings.

    E' = E - strength * E V V^T,    V [width, rank] the first right singular vectors of the unwanted rows

DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization, arXiv:2412.09169.
"""

import torch
from torch import Tensor

from studio.composition.plan import Suppression


def projected_out(embeddings: Tensor, unwanted: Tensor, how: Suppression) -> Tensor:
    """Return prompt embeddings without the directions of unwanted ones.

    Summed in fp32 and rounded once.

    Args:
        embeddings: ``[B, tokens, width]``.
        unwanted: ``[n, width]``, n at least 1.
        how: Strength, number of directions, and whether rows keep their length.
    """
    rows = embeddings.float()
    _, _, directions = torch.linalg.svd(unwanted.to(rows), full_matrices=False)
    basis = directions[: how.rank]  # [rank, width]
    kept: Tensor = rows - how.strength * (rows @ basis.mT) @ basis
    if how.keep_length:
        kept = kept * (rows.norm(dim=-1, keepdim=True) / kept.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return kept.to(embeddings.dtype)
