"""Draw pictures with a pipeline, each from its own seed, wherever it stands in a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studio.models.base import check_prompt, make_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


class Stopped(Exception):
    """Drawing was asked to stop between two steps."""


@dataclass(frozen=True)
class Settings:
    """What the pictures of a batch share.

    Attributes:
        negative_prompt: What to steer away from.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 and less turn it off.
        width: Pixels, or None for the base's own.
        height: Pixels, or None for the base's own.
    """

    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 5.0
    width: int | None = None
    height: int | None = None


def draw(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: Settings,
    on_step: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> "list[Image]":
    """Return one picture per prompt and seed, drawn as one batch.

    Each picture's noise is of its own generator on the CPU: neither the batch nor the device changes it.

    Args:
        pipe: A text-to-image pipeline; what is composed on it acts.
        prompts: One per picture.
        seeds: One per picture.
        settings: Common to all.
        on_step: Told after each denoising step how many are done.
        stop: Asked after each denoising step whether to give up.

    Raises:
        UsageError: If a prompt is longer than the text encoder reads.
        Stopped: If ``stop`` said so.
    """
    import torch

    for text in {*prompts, settings.negative_prompt}:
        check_prompt(pipe, text)

    def after_step(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(min(index + 1, settings.steps))
        if stop and stop():
            raise Stopped
        return values

    drawn = pipe(
        prompt=list(prompts),
        negative_prompt=[settings.negative_prompt] * len(prompts),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        width=settings.width,
        height=settings.height,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=after_step,
    )
    return list(drawn.images)


@contextmanager
def solver(pipe: "DiffusionPipeline", name: str) -> "Iterator[str]":
    """Give the pipeline the named scheduler for a while; yield the scheduler's class name."""
    before = pipe.scheduler
    pipe.scheduler = make_scheduler(pipe, name)
    try:
        yield type(pipe.scheduler).__name__
    finally:
        pipe.scheduler = before


@contextmanager
def quiet(pipe: "DiffusionPipeline") -> Iterator[None]:
    """Turn the pipeline's own progress bar off for a while."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
