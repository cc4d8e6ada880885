"""What a run costs in multiply-accumulates (MACs) of the denoiser, counted and not timed.

Counted are the base's own operations, of a copy without weights. What low-rank changes add where they act
beside the weights (branches in one batch, quantised bases) is not counted.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from studio.composition.executor import Passes
from studio.composition.plan import Cut, Plan, Step

# Of CLIP's prompts, and of the sizes that SDXL is told.
_TOKENS = 77
_SIZES = 6

if TYPE_CHECKING:
    from studio.composition.engine import Composition


@dataclass(frozen=True)
class UnetMacs:
    """MACs of a UNet for one row of a batch.

    Attributes:
        full: Of a whole evaluation.
        shallow: Of one that takes its deep features from a slot.
    """

    full: int
    shallow: int

    @property
    def shallow_share(self) -> float:
        """Share of a whole evaluation that a shallow one costs, often called f."""
        return self.shallow / self.full


@dataclass(frozen=True)
class Cost:
    """What evaluations of a denoiser cost.

    Attributes:
        passes: What was evaluated, in rows of a batch; of a run ``Composition.passes``.
        macs: Of the denoiser.
    """

    passes: Passes
    macs: UnetMacs

    @property
    def evaluations(self) -> int:
        """Rows evaluated, whole or not."""
        return self.passes.full + self.passes.shallow

    @property
    def total(self) -> int:
        """MACs of all evaluations."""
        return self.passes.full * self.macs.full + self.passes.shallow * self.macs.shallow

    @property
    def ratio(self) -> float:
        """MACs relative to those of the base alone on the same calls."""
        return self.total / (self.passes.asked * self.macs.full)

    @property
    def cached_share(self) -> float:
        """Share of the evaluations that took their deep features from a slot."""
        return self.passes.shallow / self.evaluations


def unet_macs(unet: Any, height: int, width: int, cut: Cut | None = None) -> UnetMacs:
    """Return what an evaluation of one row costs, counted by torch's flop counter on the meta device.

    Args:
        unet: A ``UNet2DConditionModel`` or its configuration.
        height: Of the latents.
        width: Of the latents.
        cut: Where the shallow part ends; default: that of ``Cut()``.

    Raises:
        CompositionError: If the UNet has no such cut.
    """
    config = dict(getattr(unet, "config", unet))
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    return _counted(json.dumps(plain, sort_keys=True), height, width, cut or Cut())


def plan_cost(
    plan: Plan, steps: int | Sequence[Step], macs: UnetMacs, *, guided: bool = True, pictures: int = 1
) -> Cost:
    """Return what a run of a plan costs, before anything is drawn.

    Args:
        plan: Of a method, with or without modifiers.
        steps: As for ``plan_passes``.
        macs: Of the denoiser, with the plan's own cut.
        guided: As for ``plan_passes``.
        pictures: Drawn at once.
    """
    calls = plan_passes(plan, steps, guided=guided, pictures=pictures)
    counts = (sum(getattr(each, name) for each in calls) for name in ("full", "shallow", "asked"))
    return Cost(Passes(*counts), macs)


def plan_passes(
    plan: Plan, steps: int | Sequence[Step], *, guided: bool = True, pictures: int = 1
) -> list[Passes]:
    """Return what each denoiser call of a run evaluates, before anything is drawn.

    Args:
        plan: Of a method, with or without modifiers.
        steps: Number of steps of a full run, or the step of each denoiser call: Heun makes two a step.
        guided: Whether the run has classifier-free guidance, which doubles the rows.
        pictures: Drawn at once.
    """
    calls = [Step(index, steps, index / steps) for index in range(steps)] if isinstance(steps, int) else steps
    found = []
    slots: dict[Hashable, tuple[int, int]] = {}
    for step in calls:
        passes = Passes(asked=pictures * (2 if guided else 1))
        asked = [branch for branch in plan.at(step) if guided or branch.answers_for("conditional")]
        filled = {}
        for branch in asked:
            rows = pictures * (2 if guided and branch.rows == "all" else 1)
            of_rows, kept_at = slots.get(branch.slot, (0, 0))
            if branch.reuse and of_rows == rows and kept_at >= step.index - branch.reuse:
                passes.shallow += rows
                continue
            passes.full += rows
            if branch.slot is not None:
                filled[branch.slot] = (rows, step.index)
        slots |= filled
        found.append(passes)
    return found


class PictureCost:
    """What each picture costs that a composition draws, batch by batch.

    Args:
        pipe: The pipeline.
        composition: Entered; None where nothing is composed.
    """

    def __init__(self, pipe: Any, composition: "Composition | None") -> None:
        self._pipe = pipe
        self._composition = composition
        self._before = Passes()

    def leave_out(self) -> None:
        """Count what was evaluated since the last call for no picture."""
        if self._composition is not None:
            self._before = replace(self._composition.passes)

    def take(self, pictures: int, *, height: int, width: int) -> Cost | None:
        """Return what each of the pictures since the last call cost; None where that is what the base costs.

        Args:
            pictures: Drawn since then, all of one size.
            height: In pixels.
            width: In pixels.
        """
        if self._composition is None:
            return None
        passes, before = replace(self._composition.passes), self._before
        self._before = passes
        own = Passes(
            *((now - then) // pictures for now, then in zip(*map(astuple, (passes, before)), strict=True))
        )
        if not own.shallow and own.full == own.asked:
            return None
        scale = self._pipe.vae_scale_factor
        return Cost(
            own, unet_macs(self._pipe.unet, height // scale, width // scale, self._composition.plan.cut)
        )


@cache
def _counted(config: str, height: int, width: int, cut: Cut) -> UnetMacs:
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from studio.composition.feature_cache import FeatureCache

    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(json.loads(config)).eval()
        call = _call(unet.config, height, width)
        cache = FeatureCache(unet, cut)
        with cache.keeping([(0, 1)], step=0), FlopCounterMode(display=False) as full:
            unet(**call)
        with cache.reusing([0]), FlopCounterMode(display=False) as shallow:
            unet(**call)
    # A multiply-accumulate is two operations.
    return UnetMacs(full.get_total_flops() // 2, shallow.get_total_flops() // 2)


def _call(config: Any, height: int, width: int) -> dict[str, Any]:
    """Return one row's call of a UNet, on the device in force."""
    import torch

    call = {
        "sample": torch.empty(1, config.in_channels, height, width),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, _TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _SIZES * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, _SIZES)}
        return {**call, "added_cond_kwargs": added}
    return call
