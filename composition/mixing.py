"""What the branches of a step say together, and whether a plan's branches make sense."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.composition.plan import Branch, Plan
from studio.errors import CompositionError

Half = Literal["conditional", "unconditional"]


def half(size: int, rows: Half) -> slice:
    """Return where the conditional or the unconditional rows of a guided batch are."""
    return slice(size // 2, size) if rows == "conditional" else slice(0, size // 2)


class Mixer:
    """Mixes branches' answers; resizes regions once for each size of the latents and each device."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Sequence[Tensor] | None, Sequence[Tensor]]] = {}

    def mixed(
        self,
        branches: Sequence[Branch],
        answers: Sequence[Tensor],
        *,
        guided: bool,
        regions: Mapping[str, Tensor],
        feather: float = 0.0,
    ) -> Tensor:
        """Return the step's answer ``[B, C, H, W]``: the branches' answers, each with its share.

        Summed in fp32 and rounded once.

        Args:
            branches: Of the step.
            answers: Of each branch, for the rows that it answers for.
            guided: Whether the batch is the unconditional rows and then the conditional ones.
            regions: ``[1, 1, H, W]`` or, one for each picture, ``[B, 1, H, W]``, of any size and device.
            feather: As of ``Plan``.
        """

        def total(acting: Sequence[Branch], parts: Sequence[Tensor]) -> Tensor:
            first = parts[0]
            if len(acting) == 1 and acting[0].region is None and acting[0].share == 1.0:
                return first
            summed = torch.zeros_like(first, dtype=torch.float32)
            factors = self._factors(acting, first, regions, feather)
            for factor, part in zip(factors, parts, strict=True):
                # A product of 16 bits would be rounded before it is added.
                if isinstance(factor, Tensor):
                    summed += part * factor
                else:
                    summed.add_(part, alpha=factor)
            return summed.to(first.dtype)

        if not guided or all(branch.rows == "all" for branch in branches):
            return total(branches, answers)
        halves: list[Tensor] = []
        for rows in ("conditional", "unconditional"):
            acting = [place for place, branch in enumerate(branches) if branch.answers_for(rows)]
            if acting:
                parts = [_half_of(answers[place], branches[place], rows) for place in acting]
                halves.append(total([branches[place] for place in acting], parts))
        conditional, unconditional = halves[0], halves[-1]
        return torch.cat([unconditional, conditional])

    def _factors(
        self, branches: Sequence[Branch], like: Tensor, regions: Mapping[str, Tensor], feather: float
    ) -> Sequence[Tensor | float]:
        """Return what each answer is multiplied by: a number, or a mask where regions take part."""
        names = [branch.region for branch in branches]
        if all(name is None for name in names):
            return [branch.share for branch in branches]
        masks = [regions[name] for name in names if name is not None]
        key = (
            tuple(branch.share for branch in branches),
            tuple(names),
            like.shape[0],
            like.shape[-2:],
            like.device,
            feather,
        )
        kept, factors = self._kept.get(key, (None, ()))
        # Regions of a plan that looks for them anew at each step have the same names each time.
        if kept is None or any(one is not other for one, other in zip(kept, masks, strict=True)):
            shares = [branch.share * _mask(branch, like, regions, feather) for branch in branches]
            total = torch.stack(torch.broadcast_tensors(*shares)).sum(0)
            # Once for each kind of step: reading a number from a GPU waits for all that it has to do.
            if kept is None and float(total.min()) <= 0:
                raise CompositionError(
                    "the regions leave a part of the picture to no adapter. Add one for the whole picture, "
                    "or let the base draw the rest."
                )
            factors = [share / total for share in shares]
            self._kept[key] = masks, factors
        return factors


def check_branches(plan: Plan, steps: Sequence[Sequence[Branch]]) -> None:
    """Raise CompositionError for branches that cannot be evaluated or do not make up an answer.

    Args:
        plan: That the branches are of.
        steps: Branches of each denoiser call of a run.
    """
    for number, branches in enumerate(steps, start=1):
        for rows in ("conditional", "unconditional"):
            acting = [branch for branch in branches if branch.answers_for(rows)]
            if not acting and rows == "unconditional":
                continue
            total = sum(branch.share for branch in acting)
            regional = any(branch.region is not None for branch in acting)
            if not regional and not math.isclose(total, 1.0, abs_tol=1e-6):
                raise CompositionError(
                    f"the shares of the {rows} rows at evaluation {number} sum to {total:g}, they must sum "
                    "to 1. A method of your own divides them by their sum."
                )
        for branch in branches:
            _check_names(plan, branch)


def _check_names(plan: Plan, branch: Branch) -> None:
    for name, known, what in ((branch.text, plan.texts, "text"), (branch.region, plan.regions, "region")):
        later = what == "region" and plan.watched
        if name is not None and name not in known and not later:
            raise CompositionError(
                f"a branch names the {what} '{name}'; the plan has {', '.join(known) or 'none'}. Put it into "
                f"{what}s of the plan."
            )


def _half_of(answer: Tensor, branch: Branch, rows: Half) -> Tensor:
    return answer[half(len(answer), rows)] if branch.rows == "all" else answer


def _mask(branch: Branch, like: Tensor, regions: Mapping[str, Tensor], feather: float) -> Tensor:
    size = tuple(like.shape[-2:])
    if branch.region is None:
        return torch.ones(1, 1, *size, device=like.device)
    given = regions[branch.region].to(like.device, torch.float32)
    mask = blurred(F.interpolate(given, size=size, mode="area"), feather)
    # A picture's rows come once, or once without and once with the prompt.
    return mask if len(mask) == 1 else mask.repeat(len(like) // len(mask), 1, 1, 1)


def blurred(mask: Tensor, deviation: float) -> Tensor:
    """Return a mask ``[B, 1, H, W]`` after a Gaussian of that standard deviation in pixels; 0 for none.

    Beyond its edge a mask goes on as at the edge, so that masks that sum to 1 still do.
    """
    if not deviation:
        return mask
    reach = math.ceil(3 * deviation)
    places = torch.arange(-reach, reach + 1, device=mask.device, dtype=mask.dtype)
    bell = torch.exp(-0.5 * (places / deviation) ** 2)
    bell = bell / bell.sum()
    padded = F.pad(mask, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))
