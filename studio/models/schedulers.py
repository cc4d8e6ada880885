"""Solvers by name, made from what the base model was trained with."""

import inspect
from typing import Any

from studio.errors import BaseModelError, UsageError
from studio.registry import nearest

_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}

# The noise schedule and the meaning of the prediction belong to the model. They are passed on in full,
# because from_config() drops what the base's file left to its own class's defaults, and classes differ in
# those.
_MODELS_OWN = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
)

# What latent models want where the class's default is for pictures; the base's file wins.
_LATENT = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": False},
}
_FORCED = {"dpm++2m": {"algorithm_type": "dpmsolver++", "solver_order": 2}}


def make_scheduler(pipe: Any, name: str = "default") -> Any:
    """Return a fresh scheduler for the pipeline's base model; the pipeline keeps its own.

    Args:
        pipe: The pipeline whose scheduler's configuration is the base's.
        name: "default" (the base's own class) or ddim, euler, euler-ancestral, dpm++2m, heun, pndm, unipc.

    Raises:
        UsageError: If the name is unknown.
        BaseModelError: If the solver cannot run the base's noise schedule.
    """
    import diffusers

    config = pipe.scheduler.config
    if name == "default":
        return type(pipe.scheduler).from_config(config)
    if name not in _CLASSES:
        known = ["default", *_CLASSES]
        raise UsageError(f"scheduler: unknown '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
    kind: Any = getattr(diffusers, _CLASSES[name])
    accepted = inspect.signature(kind.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        raise BaseModelError(
            f"scheduler '{name}' cannot run a base model with zero terminal signal (rescale_betas_zero_snr). "
            "Choose ddim, euler, euler-ancestral, dpm++2m or unipc."
        )
    # Defaults of the base's own class are the base's; those of another class say nothing of it.
    same = isinstance(pipe.scheduler, kind)
    latent = {} if same else {key: value for key, value in _LATENT.get(name, {}).items() if key not in config}
    own = {key: config[key] for key in _MODELS_OWN if key in config and key in accepted}
    return kind.from_config(config, **(latent | own | _FORCED.get(name, {})))
