"""What the branches of a step say together, and whether a plan's branches make sense."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from studio.composition.plan import Branch, Plan
from studio.errors import CompositionError

Half = Literal["conditional", "unconditional"]


def half(size: int, rows: Half) -> slice:
    """Return where the conditional or the unconditional rows of a guided batch are."""
    return slice(size // 2, size) if rows == "conditional" else slice(0, size // 2)


def mixed(plan: Plan, branches: Sequence[Branch], answers: Sequence[Tensor], *, guided: bool) -> Tensor:
    """Return the step's answer ``[B, C, H, W]``: the branches' answers, each with its share.

    Summed in fp32 and rounded once.

    Args:
        plan: For its regions.
        branches: Of the step.
        answers: Of each branch, for the rows that it answers for.
        guided: Whether the batch is the unconditional rows and then the conditional ones.
    """
    if not guided or all(branch.rows == "all" for branch in branches):
        return _sum(plan, branches, answers)
    halves: list[Tensor] = []
    for rows in ("conditional", "unconditional"):
        acting = [place for place, branch in enumerate(branches) if branch.answers_for(rows)]
        if acting:
            parts = [_half_of(answers[place], branches[place], rows) for place in acting]
            halves.append(_sum(plan, [branches[place] for place in acting], parts))
    conditional, unconditional = halves[0], halves[-1]
    return torch.cat([unconditional, conditional])


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
        if name is not None and name not in known:
            raise CompositionError(
                f"a branch names the {what} '{name}'; the plan has {', '.join(known) or 'none'}. Put it into "
                f"{what}s of the plan."
            )


def _half_of(answer: Tensor, branch: Branch, rows: Half) -> Tensor:
    return answer[half(len(answer), rows)] if branch.rows == "all" else answer


def _sum(plan: Plan, branches: Sequence[Branch], answers: Sequence[Tensor]) -> Tensor:
    first = answers[0]
    if len(branches) == 1 and branches[0].region is None and branches[0].share == 1.0:
        return first
    total = torch.zeros_like(first, dtype=torch.float32)
    for factor, answer in zip(_factors(plan, branches, first), answers, strict=True):
        total += answer * factor
    return total.to(first.dtype)


def _factors(plan: Plan, branches: Sequence[Branch], like: Tensor) -> Sequence[Tensor | float]:
    """Return what each answer is multiplied by: a number, or ``[1, 1, H, W]`` where regions take part."""
    if all(branch.region is None for branch in branches):
        return [branch.share for branch in branches]
    shares = [branch.share * _mask(plan, branch, like.shape[-2:]) for branch in branches]
    total = torch.stack(shares).sum(0)
    if float(total.min()) <= 0:
        raise CompositionError(
            "the regions leave a part of the picture to no adapter. Add one for the whole picture, or let "
            "the base draw the rest."
        )
    return [(share / total).to(like.device) for share in shares]


def _mask(plan: Plan, branch: Branch, size: torch.Size) -> Tensor:
    if branch.region is None:
        return torch.ones(1, 1, *size)
    mask = plan.regions[branch.region].float()
    return torch.nn.functional.interpolate(mask, size=tuple(size), mode="area")
