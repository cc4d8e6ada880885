"""What cross-attention maps say of concepts: a loss that pulls them apart, and the masks that they make.

CLoRA, arXiv:2403.19776.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.composition.concepts import Breakdown, Places

Maps = Mapping[str, Tensor]
"""Attention maps ``[B, tokens, h, w]`` by region: of the prompt that the region's branch reads."""


def groups_of(words: Breakdown, maps: Maps, *, base: str) -> list[list[Tensor]]:
    """Return for each concept its maps ``[B, h, w]``: in every prompt, and of its own trigger words.

    Args:
        words: Where the prompts name concepts.
        maps: By adapter, and that of the prompt itself.
        base: The region of the prompt itself.
    """
    groups = []
    for concept in words.prompts:
        group = [_of(maps[base], words.base[concept])]
        group += [_of(maps[adapter], named[concept]) for adapter, named in words.concepts.items()]
        if words.triggers[concept]:
            group.append(_of(maps[concept], words.triggers[concept]))
        groups.append(group)
    return groups


def contrastive_loss(groups: Sequence[Sequence[Tensor]], *, temperature: float) -> Tensor:
    """Return how badly groups of maps hold together and keep apart, summed over the batch.

    ``- mean over positives of log(exp(s+ / t) / (exp(s+ / t) + sum over negatives of exp(s- / t)))`` with
    ``s`` the cosine similarity of two maps: positives are the ordered pairs within a group, negatives of a
    pair those of its first map with maps of other groups. InfoNCE.
    """
    maps = torch.stack([each.float().flatten(1) for group in groups for each in group], dim=1)
    of = torch.tensor([place for place, group in enumerate(groups) for _ in group], device=maps.device)
    unit = F.normalize(maps, dim=-1)
    # [B, N, N]
    scores = unit @ unit.mT / temperature
    alike = of[:, None] == of
    positive = alike & ~torch.eye(len(of), dtype=torch.bool, device=maps.device)
    negatives = scores.masked_fill(alike, -torch.inf).logsumexp(-1, keepdim=True)
    losses = torch.logaddexp(scores, negatives) - scores
    return losses[:, positive].mean(1).sum()


def masks_of(words: Breakdown, maps: Maps, *, base: str, threshold: float) -> dict[str, Tensor]:
    """Return where each concept is, and where none is, as masks ``[B, 1, h, w]`` of 0 and 1 that sum to 1.

    A concept is where the map of its words or of its trigger words, under its own adapter, is at least
    ``threshold`` of that map's largest value. Where several are, the one that comes nearest to its own
    largest value has the place.
    """
    strengths = []
    for adapter, named in words.concepts.items():
        own = [named[adapter], words.triggers[adapter]]
        found = [_relative(_of(maps[adapter], places)) for places in own if places]
        strengths.append(torch.stack(found).amax(0))
    # [adapters, B, h, w]
    strength = torch.stack(strengths)
    covered = strength >= threshold
    winner = strength.argmax(0)
    masks = {
        adapter: (covered[place] & (winner == place))[:, None].float()
        for place, adapter in enumerate(words.concepts)
    }
    return {**masks, base: 1 - torch.stack(list(masks.values())).sum(0)}


def _of(maps: Tensor, places: Places) -> Tensor:
    """Return the mean map of some tokens ``[B, h, w]``."""
    return maps[:, list(places)].mean(1)


def _relative(maps: Tensor) -> Tensor:
    return maps / maps.amax((-2, -1), keepdim=True)
