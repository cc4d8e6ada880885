"""What a run reads, made ready for its base: sizes, encoded pictures and encoded captions."""

from collections.abc import Callable, Container, Iterable
from functools import lru_cache

import torch
from diffusers import DiffusionPipeline

from studio.data.batches import Samples
from studio.data.buckets import Buckets
from studio.data.cache import Cache, DiskCache, Facts, MemoryCache, network_fingerprint
from studio.data.captions import full_caption
from studio.data.folder import count, named
from studio.data.picture import Picture, PictureSet
from studio.errors import TrainingError
from studio.models.prompt_encoding import PromptEncoder
from studio.models.prompts import tokens_read
from studio.specs.train import TrainSpec
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batches, Latents, NoiseSchedule

Tell = Callable[[str], None]


def make_buckets(pipe: DiffusionPipeline, spec: TrainSpec, resolution: int) -> Buckets:
    """Return the sizes that a run brings its pictures to.

    Raises:
        TrainingError: If the base cannot work with the step between them.
    """
    if not spec.buckets:
        return Buckets.square(resolution)
    factor: int = pipe.vae_scale_factor
    # The UNet of SD halves its latents three times.
    step = spec.bucket_step or 8 * factor
    if step % factor:
        raise TrainingError(f"bucket_step must be a multiple of {factor} for this base, got {step}.")
    return Buckets.around(
        resolution,
        step=step,
        smallest=spec.bucket_min or resolution // 2,
        largest=spec.bucket_max or resolution * 2,
        upscale=spec.bucket_upscale,
    )


def check_timesteps(pipe: DiffusionPipeline, spec: TrainSpec) -> None:
    """Check that the base has the timesteps that a run is to train on.

    Raises:
        TrainingError: If it has fewer.
    """
    number = NoiseSchedule(pipe).num_timesteps
    if (spec.max_timestep or 0) > number:
        raise TrainingError(f"max_timestep must be at most {number} for this base, got {spec.max_timestep}.")
    if (spec.min_timestep or 0) >= number:
        raise TrainingError(
            f"min_timestep must be less than {number} for this base, got {spec.min_timestep}."
        )


def make_batches(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    pictures: PictureSet,
    class_pictures: PictureSet | None,
    *,
    buckets: Buckets,
    device: torch.device,
    processes: int = 1,
    tell: Tell,
) -> Batches:
    """Return the course of batches of a run.

    Args:
        pipe: The base.
        spec: The run.
        pictures: The user's.
        class_pictures: Those beside them, or None.
        buckets: Sizes that they are brought to.
        device: Where batches are put.
        processes: How many take a share of each step.
        tell: Told of damaged files.

    Raises:
        DataError: If a picture fits no bucket.
        OutputError: If the cache cannot be written.
        TrainingError: If there is no folder for a cache on disk.
    """
    cache = _cache(spec, "latents", lambda: {"vae": network_fingerprint(pipe.vae), "on": device.type}, tell)
    end = spec.max_timestep or NoiseSchedule(pipe).num_timesteps
    group = spec.batch_size * spec.gradient_accumulation * processes

    def latents(found: PictureSet, stream: str) -> Latents:
        samples = Samples(
            found,
            seed=spec.seed,
            buckets=buckets,
            num_timesteps=end,
            first_timestep=spec.min_timestep or 0,
            group=group,
            stream=stream,
            noise_offset=spec.noise_offset,
        )
        return Latents(pipe, samples, device=device, cache=cache)

    prior = latents(class_pictures, "class ") if class_pictures else None
    return Batches(latents(pictures, ""), prior, prior_weight=spec.prior_weight)


def make_validation(
    pipe: DiffusionPipeline, spec: TrainSpec, pictures: PictureSet, *, buckets: Buckets, device: torch.device
) -> Latents:
    """Return the samples that a run measures its loss on.

    Raises:
        DataError: If a picture fits no bucket.
    """
    samples = Samples(
        pictures,
        seed=spec.seed,
        buckets=buckets,
        num_timesteps=NoiseSchedule(pipe).num_timesteps,
        stream="validation ",
    )
    return Latents(pipe, samples, device=device, cache=None if spec.cache == "off" else MemoryCache())


def make_prompts(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    recurring: Container[str],
    *,
    trained: bool,
    tell: Tell,
) -> Prompts:
    """Return what encodes a run's captions.

    Args:
        pipe: The base.
        spec: Says where encoded captions are kept.
        recurring: Those that come again.
        trained: Whether the text encoders change, so that nothing may be kept.
        tell: Told of damaged files.

    Raises:
        OutputError: If the cache cannot be written.
        TrainingError: If there is no folder for a cache on disk.
    """

    def settings() -> Facts:
        # The type of each caption's numbers follows from the encoders' own.
        facts: dict[str, object] = {"on": next(pipe.unet.parameters()).device.type}
        if spec.clip_skip > 1:
            facts["clip_skip"] = spec.clip_skip
        if spec.max_token_length is not None:
            facts["max_tokens"] = spec.max_token_length
        for suffix in ("", "_2"):
            encoder = getattr(pipe, f"text_encoder{suffix}", None)
            if encoder is not None:
                facts[f"encoder{suffix}"] = network_fingerprint(encoder)
                facts[f"words{suffix}"] = getattr(pipe, f"tokenizer{suffix}").get_vocab()
        return facts | {"zero_empty": bool(pipe.config.get("force_zeros_for_empty_prompt", False))}

    cache = None if trained else _cache(spec, "captions", settings, tell)
    return Prompts(pipe, cache=cache, recurring=recurring, trained=trained, max_tokens=spec.max_token_length)


def caption_note(
    pipe: DiffusionPipeline, pictures: Iterable[Picture], *, max_tokens: int | None
) -> str | None:
    """Return what a person should know before training about captions longer than a chunk, or None.

    Args:
        pipe: The base, which knows any new token.
        pictures: Whose captions are read.
        max_tokens: The most tokens of a caption that are read; None for all.
    """
    num_tokens = lru_cache(maxsize=None)(PromptEncoder(pipe, raw=True).num_tokens)
    chunk = tokens_read(pipe, "text_encoder") - 2
    limit = max_tokens or chunk
    found = [(num_tokens(full_caption(picture)), picture.path.name) for picture in pictures]
    long = [f"{name} ({tokens} tokens)" for tokens, name in sorted(found, reverse=True) if tokens > limit]
    if not long:
        return None
    of = f"{count(len(long), 'picture')} {'has a caption' if len(long) == 1 else 'have captions'}"
    if max_tokens is None:
        return (
            f"{of} of more than {chunk} tokens, read in chunks of {chunk} as prompts of drawing are, at most "
            f"{long[0]}. max_token_length cuts them."
        )
    return (
        f"Warning: {of} of more than max_token_length ({max_tokens}) tokens, whose rest is not trained on: "
        f"{named(long)}. Raise it, or leave it out to read captions whole."
    )


def _cache(spec: TrainSpec, kind: str, settings: Callable[[], Facts], tell: Tell) -> Cache | None:
    if spec.cache == "off":
        return None
    if spec.cache == "memory":
        return MemoryCache()
    if spec.cache_folder is None:
        raise TrainingError("cache is 'disk' but there is no folder for it. Give cache_folder.")
    return DiskCache(spec.cache_folder / kind, settings=settings(), tell=tell)
