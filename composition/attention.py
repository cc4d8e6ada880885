"""What a plan may watch and steer: cross-attention maps of a step's branches, and the latents before it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from studio.composition.executor import Job
from studio.composition.mixing import half
from studio.composition.plan import Step
from studio.errors import CompositionError
from studio.models.gradients import GradientScale, frozen
from studio.models.shadow import shadowed

_REPLACEABLE = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)


class AttentionMaps:
    """Maps that cross-attention layers make of the conditional rows, by region of the branch.

    Only inside ``watching`` do these layers, and no others, compute attention plainly; their processors come
    back behind it.

    Args:
        unet: With the blocks of ``UNet2DConditionModel``.
        layers: Names of its attention modules, all of one resolution.

    Attributes:
        maps: ``[B, tokens, h, w]`` by region, mean over layers and heads.

    Raises:
        CompositionError: If something else acts in one of the layers.
    """

    def __init__(self, unet: Any, layers: Sequence[str]) -> None:
        self._modules = [unet.get_submodule(name) for name in layers]
        for name, module in zip(layers, self._modules, strict=True):
            if not isinstance(module.processor, _REPLACEABLE):
                raise CompositionError(
                    f"attention maps cannot be read of '{name}': a {type(module.processor).__name__} acts "
                    "there. Unload it, such as by pipe.unload_ip_adapter(), or choose another method."
                )
        self.maps: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, jobs: Sequence[Job], *, guided: bool) -> Iterator[None]:
        """Keep the maps of one evaluation of these jobs side by side, made inside the block.

        Args:
            jobs: What is evaluated.
            guided: Whether jobs for all rows begin with the unconditional ones.
        """
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(partial(module.set_processor, module.processor))
                module.set_processor(AttnProcessor())
                scores = partial(self._kept, module.get_attention_scores, module.heads, seen)
                stack.enter_context(shadowed(module, {"get_attention_scores": scores}))
            yield
        maps = torch.stack(seen).mean(0)
        for job, own in zip(jobs, maps.split([job.rows for job in jobs]), strict=True):
            if job.branch.region is not None and job.branch.answers_for("conditional"):
                rows = half(len(own), "conditional") if guided and job.branch.rows == "all" else slice(None)
                self.maps[job.branch.region] = _laid_out(own[rows], job.call.latents)

    @staticmethod
    def _kept(
        scores: Callable[..., Tensor], heads: int, seen: list[Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        found = scores(*args, **kwargs)
        # [B heads, h w, tokens]
        seen.append(found.unflatten(0, (-1, heads)).float().mean(1))
        return found


def _laid_out(maps: Tensor, latents: Tensor) -> Tensor:
    """Return maps ``[B, h w, tokens]`` as ``[B, tokens, h, w]``: latents halved as often as it takes."""
    height, width = latents.shape[-2:]
    while height * width > maps.shape[1]:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    laid_out: Tensor = maps.mT.unflatten(-1, (height, width))
    return laid_out


@dataclass(frozen=True)
class View:
    """What a plan is shown before a step.

    Attributes:
        step: The step.
        latents: ``[B, C, h, w]`` as the denoiser is given them, one for each picture; without the channels
            that an inpainting model has beside them.
        regions: Of the branches that answer for the conditional rows.
        attended: From a region and latents to what its branch attends to there.
        unet: What is evaluated.
    """

    step: Step
    latents: Tensor
    regions: Sequence[str]
    attended: Callable[[str, Tensor], Tensor]
    unet: nn.Module

    def gradient(self, latents: Tensor, loss: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Return the gradient of a loss of all branches' maps by the latents, fp32.

        By the chain rule, branch by branch: weights change between branches, and only one branch's
        activations are held. Each branch is evaluated twice.

        Args:
            latents: Where.
            loss: From the maps ``[B, tokens, h, w]`` by region to a number.

        Raises:
            BaseModelError: If it is not finite.
        """
        with torch.no_grad():
            maps = {region: self.attended(region, latents) for region in self.regions}
        scale = GradientScale()
        with torch.enable_grad(), frozen(self.unet):
            leaves = {region: each.detach().requires_grad_() for region, each in maps.items()}
            pulls = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
            total = torch.zeros_like(latents, dtype=torch.float32)
            for region, pull in zip(leaves, pulls, strict=True):
                if pull is not None:
                    at = latents.detach().requires_grad_()
                    (slope,), factor = scale.finite(partial(self._slope, region, at, pull))
                    assert slope is not None
                    total += slope.float() / factor
        return total

    def _slope(self, region: str, at: Tensor, pull: Tensor, factor: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.attended(region, at), at, pull * factor)
