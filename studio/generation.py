"""Draw pictures with a pipeline, each from its own seed, wherever it stands in a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from studio.models.schedulers import make_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from studio.models.prompt_encoding import PromptEncoder
    from studio.specs.drawing import Rendering


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

    @classmethod
    def of(cls, spec: "Rendering") -> Self:
        """Return those that a specification names."""
        return cls(spec.negative_prompt, spec.steps, spec.guidance_scale, spec.width, spec.height)


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
    Outside of ``reading_prompts`` the pipeline cuts prompts that are longer than its text encoder reads.

    Args:
        pipe: A text-to-image pipeline; what is composed on it acts.
        prompts: One per picture.
        seeds: One per picture.
        settings: Common to all.
        on_step: Told after each denoising step how many are done.
        stop: Asked after each denoising step whether to give up.

    Raises:
        UsageError: If the syntax of a prompt is wrong, inside of ``reading_prompts``.
        Stopped: If ``stop`` said so.
    """
    import torch

    from studio.models.execution import decoding

    def after_step(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(min(index + 1, settings.steps))
        if stop and stop():
            raise Stopped
        return values

    width, height = _size(pipe, settings)
    with decoding(pipe):
        drawn = pipe(
            prompt=list(prompts),
            negative_prompt=[settings.negative_prompt] * len(prompts),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            width=width,
            height=height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=after_step,
        )
    return list(drawn.images)


def _size(pipe: "DiffusionPipeline", settings: Settings) -> tuple[int | None, int | None]:
    """Return width and height in pixels, both or neither: diffusers' pipelines leave a single one out."""
    if settings.width is None and settings.height is None:
        return None, None
    own: int = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return settings.width or own, settings.height or own


def num_chunks(reader: "PromptEncoder", prompt: str, settings: Settings) -> int:
    """Return how many chunks long the prompts of one picture are."""
    texts = [prompt, settings.negative_prompt] if settings.guidance_scale > 1 else [prompt]
    return max(reader.num_chunks(text) for text in texts)


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the places of what is of one length, at most ``size`` at a time, the shortest first."""
    for length in sorted(set(lengths)):
        places = [place for place, each in enumerate(lengths) if each == length]
        for start in range(0, len(places), size):
            yield places[start : start + size]


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
