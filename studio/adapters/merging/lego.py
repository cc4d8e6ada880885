"""LoRA-LEGO: the rank-one parts of all adapters are clustered, and each cluster becomes one part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from studio.adapters.merger import Factors, Layer, Merger, Term
from studio.registry import MERGERS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from studio.adapters.merger import Target

_MOST_ROUNDS = 100
_TILT = 1e-4


@MERGERS.register("lego")
@dataclass(frozen=True)
class Lego(Merger):
    """Like parts of the adapters become one: k clusters of rank-one units, k is the rank.

        units u = [b; a] of all adapters, w_i delta_i = sum_u b a^T
        cluster c: mean of its units, lengthened to their mean length    (parameter reweighting)
        delta = sqrt(r / k) sum_c b_c a_c^T,    r = mean rank of the adapters    (output reweighting)

    LoRA-LEGO, arXiv:2409.16167, Sec. 3. Differs from the paper: the units are those of the SVD, with b and a
    of equal length, since (t b, a / t) is the same unit and any r of them that span the same change would do;
    and u and -u, the same unit, are told apart by neither clustering nor mean. A change without low rank
    gives its leading units; biases and norms are summed.
    """

    rank: int | None = None
    merge_seed: int = 0
    exact: ClassVar[bool] = True

    def merge(self, layer: Layer) -> Target:
        """Return the product of the clusters' centres."""
        import torch

        from studio.adapters.factors import weighted_sum

        if len(layer.shape) < 2:
            return weighted_sum(layer)
        parts = [_units(layer, term) for term in layer.terms]
        pool = torch.cat(parts)
        # The longest first, whichever adapter it is from: the order of adapters does not matter.
        pool = pool[pool.norm(dim=1).argsort(descending=True, stable=True)]
        mean_rank = len(pool) / len(parts)
        count = min(layer.rank, len(pool))
        centres = (
            _centres(pool, count, layer.generator(self.merge_seed)) * (mean_rank / max(count, 1)) ** 0.25
        )
        up, down = centres.float().split((layer.shape[0], centres.shape[1] - layer.shape[0]), 1)
        return Factors(up.T.contiguous(), down.contiguous())


def _units(layer: Layer, term: Term) -> Tensor:
    """Return a term's units ``[rank, out + in]``, fp64, those of length zero left out."""
    import torch

    from studio.adapters.factors import truncated

    product = term.factors()
    if product is None:
        factors, _ = truncated(layer.delta(term), layer.rank)
    else:
        factors, _ = truncated(product, product.rank)
    units = torch.cat([factors.up.T, factors.down], 1).double()
    units = units[units.norm(dim=1) > 1e-6 * units.norm()]
    # The decomposition's signs are arbitrary: the largest entry becomes positive.
    largest = units.gather(1, units.abs().argmax(1, keepdim=True))
    return units * largest.sign()


def _centres(units: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the mean of each cluster ``[count, size]`` at the mean length of its units."""
    import torch

    labels, means = _clusters(units, count, generator)
    lengths: Tensor = units.norm(dim=1)
    wanted = torch.zeros(count).to(lengths).index_add_(0, labels, lengths) / labels.bincount(minlength=count)
    reweighted: Tensor = means * (wanted / means.norm(dim=1))[:, None]
    return reweighted


def _mean(members: Tensor, near: Tensor) -> Tensor:
    """Return the mean of vectors, each with the sign that brings it nearer to ``near``.

    One adapter's units are orthogonal: what rounding leaves of their products must not decide.
    """
    import torch

    cosines = (members @ near) / (members.norm(dim=1) * near.norm())
    signs = torch.where(cosines < -_TILT, -1.0, 1.0).to(members)
    return (members * signs[:, None]).mean(0)


def _clusters(units: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return each unit's cluster ``[n]`` and the clusters' means ``[count, size]``.

    K-means in which a vector and its negative are one point.

    Starts by k-means++ (Arthur and Vassilvitskii 2007); no cluster is empty.
    """
    import torch

    if count >= len(units):
        return torch.arange(len(units)), units
    chosen = [int(units.square().sum(1).argmax())]
    while len(chosen) < count:
        apart = _distances(units, units[chosen]).amin(1)
        # Units that all lie on chosen ones leave nothing to draw from.
        free = apart if bool(apart.any()) else torch.ones_like(apart).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(free, 1, generator=generator)))
    centres, labels = units[chosen], torch.full((len(units),), -1)
    for _ in range(_MOST_ROUNDS):
        distances = _distances(units, centres)
        nearest = distances.argmin(1)
        for empty in set(range(count)) - set(nearest.tolist()):
            crowded = nearest.bincount(minlength=count)[nearest] > 1
            farthest = int(distances.amin(1).where(crowded, -1.0).argmax())
            nearest[farthest] = empty
        if torch.equal(nearest, labels):
            break
        labels = nearest
        centres = torch.stack([_mean(units[labels == label], centres[label]) for label in range(count)])
    return labels, centres


def _distances(units: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances ``[n, k]`` to the nearer of each centre and its negative."""
    products = (units @ centres.T).abs()
    lengths = units.square().sum(1)[:, None] + centres.square().sum(1)
    return (lengths - 2 * products).clamp_min(0)
