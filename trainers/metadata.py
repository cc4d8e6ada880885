"""What an adapter's file says about its training: kohya's ``ss_*`` keys that other tools read, and our own.

Paths, prompts and captions stay out: they name people and places, and the file is made to be handed on.
"""

import json
import math

from diffusers import DiffusionPipeline

from studio.adapters.families import KOHYA_VERSIONS
from studio.adapters.origin import origin_facts
from studio.models.architecture import architecture
from studio.specs.train import TrainSpec

PRIVATE = {
    "data",
    "output",
    "prompt",
    "sample_prompts",
    "validation_data",
    "cache_folder",
    "class_data",
    "class_prompts",
    "author",
    "overwrite",
    "resume",
    "tracker",
    "device",
    "base",
}


def base_facts(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return what the file says about the base: family, kind of prediction, fingerprint."""
    family = architecture(pipe)
    velocity = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    return {
        "ss_base_model_version": KOHYA_VERSIONS[family],
        "ss_v2": str(family.startswith("sd2")),
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        **origin_facts(pipe),
    }


def run_facts(spec: TrainSpec, *, pictures: int, resolution: int, precision: str) -> dict[str, str]:
    """Return what the file says about the run as it was asked for.

    Args:
        pictures: How many samples an epoch has.
        resolution: Side of the training pictures in pixels.
        precision: Number type of the forward pass.
    """
    trains_text = bool(getattr(spec.options, "train_text_encoder", False))
    facts = {
        "ss_output_name": spec.output.stem,
        "ss_seed": str(spec.seed),
        "ss_max_train_steps": str(spec.steps),
        "ss_learning_rate": f"{spec.unet_learning_rate:g}",
        "ss_unet_lr": f"{spec.unet_learning_rate:g}",
        "ss_text_encoder_lr": f"{spec.encoder_learning_rate:g}" if trains_text else "None",
        "ss_optimizer": spec.optimizer,
        "ss_lr_scheduler": spec.schedule,
        "ss_lr_warmup_steps": str(spec.warmup_steps),
        "ss_max_grad_norm": f"{spec.max_grad_norm:g}",
        "ss_min_snr_gamma": "None" if spec.min_snr_gamma is None else f"{spec.min_snr_gamma:g}",
        "ss_batch_size_per_device": str(spec.batch_size),
        "ss_gradient_accumulation_steps": str(spec.gradient_accumulation),
        "ss_gradient_checkpointing": str(spec.gradient_checkpointing),
        "ss_caption_dropout_rate": f"{spec.caption_dropout:g}",
        "ss_mixed_precision": "no" if precision == "fp32" else precision,
        "ss_num_train_images": str(pictures),
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "studio.spec": json.dumps(spec.model_dump(mode="json", exclude=PRIVATE), sort_keys=True),
    }
    said = {"modelspec.author": spec.author, "modelspec.trigger_phrase": spec.trigger}
    return facts | {key: value for key, value in said.items() if value}


def progress_facts(spec: TrainSpec, *, steps: int, pictures: int, processes: int = 1) -> dict[str, str]:
    """Return what the file says about how far training came."""
    epochs = math.ceil(steps * spec.batch_size * spec.gradient_accumulation * processes / pictures)
    return {"ss_steps": str(steps), "ss_epoch": str(epochs), "ss_num_epochs": str(epochs)}
