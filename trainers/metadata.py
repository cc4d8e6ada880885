"""What an adapter's file says about its training: kohya's ``ss_*`` keys that other tools read, and our own.

Paths and captions stay out unless they are asked for: they name people and places, and the file is made to be
handed on.
"""

import json
import math
from pathlib import Path

from diffusers import DiffusionPipeline

from studio.adapters.families import KOHYA_VERSIONS
from studio.adapters.header import tensor_hash
from studio.adapters.metadata import now
from studio.adapters.origin import origin_facts
from studio.data.buckets import Buckets
from studio.data.captions import tag_frequency
from studio.data.dataset import DataSet
from studio.data.picture import Picture, PictureSet, Treatment
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
    "start_from",
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


def run_facts(
    pipe: DiffusionPipeline,
    spec: TrainSpec,
    data: DataSet,
    *,
    buckets: Buckets,
    resolution: int,
    precision: str,
    processes: int = 1,
) -> dict[str, str]:
    """Return what the file says about the run as it was asked for, as much as the user wants said.

    Args:
        pipe: The base.
        spec: The run.
        data: Its pictures.
        buckets: Sizes that they are brought to.
        resolution: Side of the training pictures in pixels.
        precision: Number type of the forward pass.
        processes: How many take a share of each step.
    """
    said = {"modelspec.author": spec.author} if spec.author else {}
    if spec.metadata == "minimal":
        return said
    if spec.trigger:
        said["modelspec.trigger_phrase"] = spec.trigger
    if spec.start_from is not None:
        said["studio.start_from"] = tensor_hash(spec.start_from)
    facts = {
        "ss_output_name": spec.output.stem,
        "ss_sd_model_name": Path(spec.base).name,
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "ss_mixed_precision": "no" if precision == "fp32" else precision,
        "ss_total_batch_size": str(spec.batch_size * spec.gradient_accumulation * processes),
        "studio.spec": json.dumps(spec.model_dump(mode="json", exclude=PRIVATE), sort_keys=True),
    }
    return (
        facts
        | _settings(spec)
        | _reading(pipe, spec)
        | _pictures(data, spec)
        | _sizes(data, spec, buckets=buckets, resolution=resolution)
        | said
    )


def _settings(spec: TrainSpec) -> dict[str, str]:
    """Return steps, rates, optimizer and loss."""
    trains_text = bool(getattr(spec.options, "train_text_encoder", False))
    given = ",".join(f"{name}={value}" for name, value in spec.optimizer_options.items())
    return {
        "ss_seed": str(spec.seed),
        "ss_max_train_steps": str(spec.steps),
        "ss_learning_rate": f"{spec.unet_learning_rate:g}",
        "ss_unet_lr": f"{spec.unet_learning_rate:g}",
        "ss_text_encoder_lr": f"{spec.encoder_learning_rate:g}" if trains_text else "None",
        "ss_optimizer": f"{spec.optimizer}({given})" if given else spec.optimizer,
        "ss_lr_scheduler": spec.schedule,
        "ss_lr_warmup_steps": str(spec.warmup_steps),
        "ss_max_grad_norm": f"{spec.max_grad_norm:g}",
        "ss_loss_type": spec.loss,
        "ss_min_snr_gamma": "None" if spec.min_snr_gamma is None else f"{spec.min_snr_gamma:g}",
        "ss_debiased_estimation": str(spec.debiased),
        "ss_noise_offset": f"{spec.noise_offset:g}" if spec.noise_offset else "None",
        "ss_prior_loss_weight": f"{spec.prior_weight:g}",
        "ss_batch_size_per_device": str(spec.batch_size),
        "ss_gradient_accumulation_steps": str(spec.gradient_accumulation),
        "ss_gradient_checkpointing": str(spec.gradient_checkpointing),
        "ss_cache_latents": str(spec.cache != "off"),
    }


def _reading(pipe: DiffusionPipeline, spec: TrainSpec) -> dict[str, str]:
    """Return which layer prompts are read from, how much of them, and the timesteps."""
    facts = {"ss_clip_skip": "None" if architecture(pipe) == "sdxl" else str(spec.clip_skip)}
    if spec.max_token_length is not None:
        facts["ss_max_token_length"] = str(spec.max_token_length)
    if spec.min_timestep is not None or spec.max_timestep is not None:
        end = spec.max_timestep or pipe.scheduler.config.num_train_timesteps
        facts["modelspec.timestep_range"] = f"{spec.min_timestep or 0},{end}"
    return facts


def _pictures(data: DataSet, spec: TrainSpec) -> dict[str, str]:
    """Return how many pictures there are and what is done with them; names and tags only if asked for."""
    own, held = data.class_pictures, data.validation
    drawn = spec.class_pictures if spec.class_prompts and own is None else 0
    facts = {
        "ss_num_train_images": str(data.pictures.epoch_size),
        "ss_num_reg_images": str(drawn if own is None else own.epoch_size),
        "ss_num_validation_images": str(0 if held is None else held.epoch_size),
        "ss_dataset_dirs": _folders(data.pictures, spec),
        "ss_reg_dataset_dirs": "{}" if own is None else _folders(own, spec),
    }
    if spec.metadata == "full":
        tags = {
            # Tags are counted by samples, which a folder has as many of as it has repeats.
            name: {tag: number // found[0].repeats for tag, number in tag_frequency(found).items()}
            for name, found in _named(data.pictures, spec).items()
        }
        facts["ss_tag_frequency"] = json.dumps(tags)
    treatments = {picture.treatment for picture in data.pictures.pictures}
    return facts | (_treatment(treatments.pop()) if len(treatments) == 1 else {})


def _treatment(treatment: Treatment) -> dict[str, str]:
    return {
        "ss_flip_aug": str(treatment.flip),
        "ss_color_aug": str(treatment.color_jitter > 0),
        "ss_random_crop": str(not treatment.center_crop),
        "ss_shuffle_caption": str(treatment.shuffle_tags),
        "ss_keep_tokens": str(treatment.keep_tags),
        "ss_caption_dropout_rate": f"{treatment.caption_dropout:g}",
        "ss_caption_tag_dropout_rate": f"{treatment.tag_dropout:g}",
    }


def _sizes(data: DataSet, spec: TrainSpec, *, buckets: Buckets, resolution: int) -> dict[str, str]:
    """Return the sizes that the pictures are brought to, and how many samples of an epoch have each."""
    members = buckets.assign(data.pictures.pictures)
    found = {
        number: {"resolution": size, "count": len(positions)}
        for number, (size, positions) in enumerate(members.items())
    }
    facts = {"ss_enable_bucket": str(spec.buckets), "ss_bucket_info": json.dumps({"buckets": found})}
    if spec.buckets:
        facts |= {
            "ss_bucket_no_upscale": str(not spec.bucket_upscale),
            "ss_min_bucket_reso": str(spec.bucket_min or resolution // 2),
            "ss_max_bucket_reso": str(spec.bucket_max or resolution * 2),
        }
    return facts


def _folders(pictures: PictureSet, spec: TrainSpec) -> str:
    """Return repeats and number of pictures of each folder, as JSON."""
    folders = {
        name: {"n_repeats": found[0].repeats, "img_count": len(found)}
        for name, found in _named(pictures, spec).items()
    }
    return json.dumps(folders)


def _named(pictures: PictureSet, spec: TrainSpec) -> dict[str, list[Picture]]:
    """Return the pictures of each folder by its name, or by a number where names are not to be told."""
    named: dict[str, list[Picture]] = {}
    for number, ((folder, _), found) in enumerate(pictures.by_folder().items(), 1):
        # Several may have one name.
        twice = f"{folder} ({number})" if folder in named else folder
        named[twice if spec.metadata == "full" else str(number)] = found
    return named


def progress_facts(spec: TrainSpec, *, steps: int, pictures: int, processes: int = 1) -> dict[str, str]:
    """Return what the file says about how far training came."""
    if spec.metadata == "minimal":
        return {}
    epochs = math.ceil(steps * spec.batch_size * spec.gradient_accumulation * processes / pictures)
    return {"ss_steps": str(steps), "ss_epoch": str(epochs), "ss_num_epochs": str(epochs)}


def time_facts(spec: TrainSpec, *, started: float) -> dict[str, str]:
    """Return what the file says about when it was trained: seconds since 1970."""
    if spec.metadata == "minimal":
        return {}
    return {"ss_training_started_at": str(started), "ss_training_finished_at": str(now())}
