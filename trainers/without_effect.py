"""Settings that a user has given and that nothing in the run reads."""

from collections.abc import Iterator

from studio.specs.train import TrainSpec


def without_effect(spec: TrainSpec) -> Iterator[str]:
    """Yield a sentence on each setting of a run that is given and does nothing, and on what it needs."""
    options = spec.options
    needs = {
        "text_encoder_learning_rate": ("train_text_encoder", getattr(options, "train_text_encoder", False)),
        "token_learning_rate": ("token", getattr(options, "token", None)),
        "init_batches": ("init lora-ga or eva", getattr(options, "init", "") in ("lora-ga", "eva")),
        "sample_prompts": ("sample_every", spec.sample_every),
        "sample_steps": ("sample_every or class_prompts", spec.sample_every or spec.class_prompts),
        "cache_folder": ("cache disk", spec.cache == "disk"),
        "keep_adapters": ("save_every", spec.save_every),
        "class_pictures": ("class_prompts", spec.class_prompts),
        "prior_weight": ("class_prompts or class_data", spec.has_class_pictures),
    }
    for part in (spec, options):
        for name in part.model_fields_set & needs.keys():
            what, there = needs[name]
            if not there and getattr(part, name) != type(part).model_fields[name].default:
                yield f"{name} has no effect without {what}."
