"""Under which heading each field of a specification stands, in the help text and on the page."""

from collections.abc import Mapping
from itertools import chain

from pydantic import BaseModel

Groups = Mapping[str, tuple[str, ...]]
OTHERS = "other options"

TRAINING: Groups = {
    "run": (
        "data", "prompt", "base", "method", "output", "overwrite", "resume", "start_from", "steps",
        "batch_size", "learning_rate", "resolution", "seed",
    ),
    "captions": (
        "trigger", "caption_extension", "tag_separator", "shuffle_tags", "keep_tags", "tag_dropout",
        "caption_dropout", "max_token_length", "clip_skip",
    ),
    "pictures": (
        "buckets", "bucket_step", "bucket_min", "bucket_max", "bucket_upscale", "flip", "center_crop",
        "color_jitter", "masks", "unmasked_weight", "skip_bad",
    ),
    "class pictures": ("class_prompts", "class_pictures", "class_data", "prior_weight"),
    "optimizer and schedule": (
        "optimizer", "optimizer_options", "text_encoder_learning_rate", "schedule", "schedule_restarts",
        "schedule_power", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation",
        "ema_decay", "average_last",
    ),
    "loss": (
        "loss", "huber_delta", "min_snr_gamma", "debiased", "noise_offset", "min_timestep", "max_timestep",
    ),
    "memory and speed": (
        "device", "precision", "gradient_checkpointing", "attention", "compile",
        "quantize_base", "offload_encoders", "cache", "cache_folder",
    ),
    "validation": ("validation_split", "validation_data", "validate_every", "patience"),
    "samples": ("sample_every", "sample_prompts", "sample_steps"),
    "saving": (
        "format", "author", "metadata", "save_every", "keep_adapters", "checkpoint_every", "keep_checkpoints",
        "tracker",
    ),
}  # fmt: skip
"""Of training. A field that is named nowhere stands under ``OTHERS``, last."""


def grouped(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return the names of a model's fields by heading, in the order in which they are to be shown.

    A model without ``groups`` has one heading. The options of a method are not among the fields.
    """
    fields = [name for name in model.model_fields if name != "options"]
    groups: Groups = getattr(model, "groups", {"options": tuple(fields)})
    found = {heading: [name for name in names if name in fields] for heading, names in groups.items()}
    named = {*chain.from_iterable(found.values())}
    found[OTHERS] = [name for name in fields if name not in named]
    return {heading: names for heading, names in found.items() if names}
