"""Which family a pipeline belongs to."""

from typing import Any, Literal

from studio.errors import BaseModelError

Architecture = Literal["sd1", "sd2", "sd2-v", "sdxl"]

# Width of the text features that SD 2.x's denoiser reads; every other width with one text encoder is of SD
# 1.x's family.
_SD2_WIDTH = 1024


def architecture(pipe: Any) -> Architecture:
    """Return the family of a diffusers pipeline; a small model of SD 1.x's classes (the starter) is "sd1".

    "sd2-v" is SD 2.x trained on velocity (the 768 px models), "sd2" the one trained on noise.

    Raises:
        BaseModelError: If it is none of them.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or type(unet).__name__ not in ("UNet2DConditionModel", "OptimizedModule"):
        raise BaseModelError(
            f"{type(pipe).__name__} has no UNet of SD 1.x, SD 2.x or SDXL. Choose a base of one of these."
        )
    if unet.config.addition_embed_type == "text_time":
        return "sdxl"
    if unet.config.cross_attention_dim == _SD2_WIDTH:
        return "sd2-v" if pipe.scheduler.config.get("prediction_type") == "v_prediction" else "sd2"
    return "sd1"
