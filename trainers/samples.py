"""What a run draws on the way, as requests of the kind that ``studio generate`` takes."""

from collections.abc import Mapping
from typing import Any

from studio.errors import SpecError, UsageError
from studio.models.prompt_syntax import read_emphasis, take_flags, take_tags
from studio.specs import GenerateSpec, parse_spec
from studio.specs.train import TrainSpec

LARGEST_WHOLE = 1024
"""Pixels of a side up to which a sample is decoded as a whole, unless encoders rest to save memory."""


def sample_specs(spec: TrainSpec, caption: str) -> tuple[GenerateSpec, ...]:
    """Return the sample pictures of a run, the same after every step.

    Its sample prompts are read as prompts of ``studio generate``: ``--n fog --d 7`` at the end of one counts
    for it alone.

    Args:
        spec: The run.
        caption: What is drawn where it names no prompts, read as a caption.

    Raises:
        SpecError: If a prompt cannot be drawn; says what is wrong with each.
    """
    if not spec.sample_prompts:
        return (drawn_raw(spec, caption, spec.seed),)
    found, problems = [], []
    for line in spec.sample_prompts:
        try:
            found.append(_request(spec, _read(line)))
        except SpecError as error:
            problems += [f"sample_prompts, '{line}': {problem}" for problem in error.problems]
        except UsageError as error:
            problems.append(f"sample_prompts, '{line}': {error}")
    if problems:
        raise SpecError(problems)
    return tuple(found)


def drawn_raw(spec: TrainSpec, prompt: str, seed: int) -> GenerateSpec:
    """Return a picture of a prompt in which no character means anything else, as in captions."""
    return _request(spec, {"prompt": prompt, "raw_prompt": True, "seed": seed})


def _read(line: str) -> dict[str, Any]:
    """Return the fields that a sample prompt gives.

    Raises:
        UsageError: If its syntax is wrong, or it names adapters.
    """
    prompt, settings = take_flags(line)
    texts = (prompt, settings.get("negative_prompt", ""))
    if any(take_tags(text)[1] for text in texts):
        raise UsageError("samples show the adapter that is trained and no other. Leave the tag out.")
    for text in texts:
        read_emphasis(text)
    return {"prompt": prompt, **settings}


def _request(spec: TrainSpec, own: Mapping[str, Any]) -> GenerateSpec:
    common = {
        "base": spec.base,
        "quantize_base": spec.quantize_base,
        "seed": spec.seed,
        "steps": spec.sample_steps,
        "clip_skip": spec.clip_skip,
        "width": spec.resolution,
        "height": spec.resolution,
    }
    found = parse_spec(GenerateSpec, {**common, **own})
    short = spec.offload_encoders or max(found.width or 0, found.height or 0) > LARGEST_WHOLE
    return found.model_copy(update={"vae_tiling": short})
