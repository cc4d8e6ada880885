"""kohya's training TOML (``train_network.py --config_file``) in our own terms, as far as they mean the same.

What such a file leaves out has kohya's default, so that is written where ours is another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.errors import UsageError

Values = dict[str, Any]
Left = dict[str, str]

DEFAULTS: Mapping[str, Any] = {
    "network_dim": 4,
    "network_alpha": 1,
    "max_train_steps": 1600,
    "train_batch_size": 1,
    "lr_warmup_steps": 0,
    "min_snr_gamma": 0,
    "max_token_length": 75,
    "caption_extension": ".caption",
    "enable_bucket": False,
}
"""Values of what a file leaves out, where ours are others."""
SAME: Mapping[str, str] = {
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "data",
    "dataset_config": "data",
    "reg_data_dir": "class_data",
    "network_weights": "start_from",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_checkpointing": "gradient_checkpointing",
    "lr_warmup_steps": "warmup_steps",
    "seed": "seed",
    "clip_skip": "clip_skip",
    "max_token_length": "max_token_length",
    "min_snr_gamma": "min_snr_gamma",
    "debiased_estimation_loss": "debiased",
    "noise_offset": "noise_offset",
    "min_timestep": "min_timestep",
    "max_timestep": "max_timestep",
    "prior_loss_weight": "prior_weight",
    "caption_extension": "caption_extension",
    "caption_separator": "tag_separator",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "flip_aug": "flip",
    "enable_bucket": "buckets",
    "save_every_n_steps": "save_every",
    "sample_every_n_steps": "sample_every",
    "log_with": "tracker",
    "metadata_author": "author",
}
"""Our setting by kohya's, where values mean the same."""
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "lion": "lion", "prodigy": "prodigy"}
# The packages that kohya takes Lion and Prodigy from call some settings otherwise, and have other defaults.
OPTIONS = {"decouple": "weight_decouple", "use_bias_correction": "bias_correction"}
OWN_OPTIONS: Mapping[str, Values] = {
    "lion": {"weight_decay": 0.0},
    "prodigy": {"weight_decay": 0.0, "bias_correction": False, "safeguard_warmup": False},
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "cosine_with_restarts": "restarts",
    "linear": "linear",
    "polynomial": "polynomial",
}
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
NO_MATTER = {
    "cache_latents", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "log_prefix",
    "logging_dir", "lowram", "max_data_loader_n_workers", "mem_eff_attn", "network_train_unet_only",
    "output_name", "persistent_data_loader_workers", "v2", "v_parameterization", "vae_batch_size",
}  # fmt: skip
"""What changes no result, or is read from the base."""
REASONS: Mapping[str, str] = {
    "color_aug": "set color_jitter to the amount",
    "max_train_epochs": "steps are counted, not epochs: set steps",
    "network_args": "set targets, block_ranks, block_learning_rates for convolutions and single blocks",
    "network_dropout": "kohya drops elsewhere than dropout does",
    "network_train_text_encoder_only": "the UNet always learns",
    "resume": "only runs of one's own go on; start_from takes an adapter's file",
    "sample_every_n_epochs": "set sample_every to steps",
    "save_every_n_epochs": "set save_every to steps",
    "save_last_n_epochs": "set keep_adapters to how many",
    "save_last_n_steps": "set keep_adapters to how many",
    "save_state": "set checkpoint_every to steps",
    "weighted_captions": "captions are read as they stand",
}


def flat(document: Mapping[str, Any]) -> Values:
    """Return the entries of a file; the names of its sections mean nothing."""
    values: Values = {}
    for name, value in document.items():
        values |= value if isinstance(value, dict) else {name: value}
    return values


def translated(given: Mapping[str, Any]) -> tuple[Values, Left]:
    """Return our settings, and by kohya's names the reasons why others were not taken over.

    Args:
        given: kohya's settings.

    Raises:
        UsageError: If it is for another kind of network than kohya's LoRA.
    """
    rest = {**DEFAULTS, **{name: value for name, value in given.items() if value not in (None, "")}}
    if (network := rest.pop("network_module", "networks.lora")) != "networks.lora":
        raise UsageError(
            f"network_module is '{network}', and 'networks.lora' alone is translated. Choose a method of "
            "'studio list training' and set its options yourself."
        )
    left: Left = {}
    ours: Values = {"method": "lora", "output": str(Path(rest.pop("output_dir", "")) / _file(rest))}
    for part in (_layers, _optimizer, _schedule, _pictures, _machine):
        ours |= part(rest, left)
    if "optimizer_type" in left:
        for name in ("learning_rate", "text_encoder_learning_rate"):
            if ours.pop(name, None) is not None:
                left[name] = "it was meant for that optimizer"
    ours |= {SAME[name]: rest.pop(name) for name in list(rest) if name in SAME}
    ours["min_snr_gamma"] = ours["min_snr_gamma"] or "none"
    for name, value in rest.items():
        # What is off asks for nothing.
        if value and name not in NO_MATTER:
            left.setdefault(name, REASONS.get(name, "nothing here means the same"))
    return ours, left


def _file(rest: Values) -> str:
    return f"{rest.get('output_name', 'last')}.safetensors"


def _layers(rest: Values, left: Left) -> Values:
    """Return what learns and at which rates: kohya's layers are all of the transformers'."""
    rate = rest.pop("learning_rate", 2e-6)
    unet, text = rest.pop("unet_lr", rate), rest.pop("text_encoder_lr", rate)
    text = text[0] if isinstance(text, list) else text
    learns = bool(text) and not rest.get("network_train_unet_only")
    return {
        "targets": "all",
        "exclude": ["resnets", "downsamplers", "upsamplers"],
        "learning_rate": unet,
        **({"train_text_encoder": True, "text_encoder_learning_rate": text} if learns else {}),
    }


def _optimizer(rest: Values, left: Left) -> Values:
    asked = rest.pop("optimizer_type", "AdamW8bit" if rest.pop("use_8bit_adam", False) else "AdamW")
    if str(asked).lower() not in OPTIMIZERS:
        left["optimizer_type"] = (
            "kohya's finds its rate itself, ours is given one: set optimizer and learning_rate"
            if str(asked).lower() == "adafactor"
            else f"'{asked}' is not among the optimizers"
        )
        rest.pop("optimizer_args", None)
        return {}
    name = OPTIMIZERS[str(asked).lower()]
    found: Values = {"optimizer": name}
    options: Values = dict(OWN_OPTIONS.get(name, {}))
    given = rest.pop("optimizer_args", ())
    for entry in given.split() if isinstance(given, str) else given:
        key, _, value = (word.strip() for word in entry.partition("="))
        options[OPTIONS.get(key, key)] = value
    if "weight_decay" in options:
        found["weight_decay"] = options.pop("weight_decay")
    if options:
        found["optimizer_options"] = options
    if norm := rest.pop("max_grad_norm", 1.0):
        found["max_grad_norm"] = norm
    else:
        left["max_grad_norm"] = "gradients are always clipped: set it high"
    return found


def _schedule(rest: Values, left: Left) -> Values:
    """Return the course of the learning rate, and the loss."""
    asked = rest.pop("lr_scheduler", "constant")
    found: Values = {"schedule": SCHEDULES.get(asked, "constant")}
    if asked not in SCHEDULES:
        left["lr_scheduler"] = f"'{asked}' is not among the schedules"
    if found["schedule"] == "restarts":
        found["schedule_restarts"] = rest.pop("lr_scheduler_num_cycles", 1)
    if found["schedule"] == "polynomial":
        found["schedule_power"] = rest.pop("lr_scheduler_power", 1.0)
    if (loss := rest.pop("loss_type", "l2")) in ("l1", "l2"):
        found["loss"] = loss
    else:
        left["loss_type"] = f"'{loss}' changes with the timestep there; loss 'huber' does not"
    share = 0 < rest["lr_warmup_steps"] < 1
    if "max_train_epochs" in rest:
        # It wins over the steps.
        del rest["max_train_steps"]
        if share:
            rest["lr_warmup_steps"] = 0
            left["lr_warmup_steps"] = "it is a share of the steps, which follow from epochs and pictures"
    elif share:
        rest["lr_warmup_steps"] = round(rest["lr_warmup_steps"] * rest["max_train_steps"])
    return found


def _pictures(rest: Values, left: Left) -> Values:
    found: Values = {"center_crop": not rest.pop("random_crop", False)}
    sides = rest.pop("resolution", None)
    sides = sides.split(",") if isinstance(sides, str) else sides if isinstance(sides, list) else [sides]
    if len({str(side).strip() for side in sides}) > 1:
        left["resolution"] = "it is one number, the side of a square: give resolution"
    elif sides[0] is not None:
        found["resolution"] = int(sides[0])
    buckets = {
        "bucket_min": rest.pop("min_bucket_reso", 256),
        "bucket_max": rest.pop("max_bucket_reso", 1024),
        "bucket_step": rest.pop("bucket_reso_steps", 64),
        "bucket_upscale": not rest.pop("bucket_no_upscale", False),
    }
    return found | (buckets if rest["enable_bucket"] else {})


def _machine(rest: Values, left: Left) -> Values:
    """Return how it computes, what it draws and what the file says."""
    asked = rest.pop("mixed_precision", "no")
    found: Values = {"precision": PRECISIONS.get(asked, "auto")}
    attention = [kind for kind in ("xformers", "sdpa") if rest.pop(kind, False)]
    if attention:
        found["attention"] = attention[0]
    if rest.pop("cache_latents_to_disk", False):
        found["cache"] = "disk"
    found["metadata"] = "minimal" if rest.pop("no_metadata", False) else "full"
    if (kind := rest.pop("save_model_as", "safetensors")) != "safetensors":
        left["save_model_as"] = f"files are safetensors, not {kind}"
    if rest.pop("save_precision", "fp16") != "fp16":
        left["save_precision"] = "files are fp16; 'studio convert --precision' writes others"
    if prompts := rest.get("sample_prompts"):
        file = Path(prompts)
        if file.suffix == ".txt" and file.is_file():
            lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
            found["sample_prompts"] = [line for line in lines if line and not line.startswith("#")]
            del rest["sample_prompts"]
        else:
            left["sample_prompts"] = "it is no text file that is there: give the prompts themselves"
    return found
