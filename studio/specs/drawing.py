"""What a user may ask of drawing pictures of a prompt, whatever is composed on the base."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from studio.specs.execution import Attention, ClipSkip, Compile, Offload, Quantization


class Rendering(BaseModel):
    """How pictures are drawn, whatever of."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    negative_prompt: str = Field("", description="What to steer away from.")
    raw_prompt: bool = Field(
        False, description="Take brackets, BREAK, tags and settings in prompts as the characters they are."
    )
    adapter_folder: Path | None = Field(
        None, description="Where <lora:name> looks for a file before the workspace's adapters."
    )
    steps: int = Field(25, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        5.0, ge=0, le=50, description="Classifier-free guidance; 1 and less turn it off."
    )
    width: int | None = Field(
        None, ge=16, le=8192, multiple_of=8, description="Width in pixels; default: the base's own."
    )
    height: int | None = Field(
        None, ge=16, le=8192, multiple_of=8, description="Height in pixels; default: the base's own."
    )
    scheduler: Literal["default", "ddim", "euler", "euler-ancestral", "dpm++2m", "heun", "pndm", "unipc"] = (
        Field("default", description="Solver; default: the base's own.")
    )
    clip_skip: ClipSkip = 1
    batch_size: int = Field(1, ge=1, le=1024, description="Pictures drawn at once.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Number type; auto: fp32 on the CPU, fp16 on a GPU."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    attention: Attention = "auto"
    quantize_base: Quantization = "none"
    offload: Offload = "none"
    vae_tiling: bool = Field(
        False,
        description="Decode pictures tile by tile: less memory for large ones, their seams blended.",
    )
    compile: Compile = False


class Prompted(BaseModel):
    """What pictures are drawn of."""

    prompt: str = Field(
        description="What to draw. (words:1.2) weighs words, <lora:name:0.8> adds an adapter; see "
        "docs/generating.md."
    )


class Drawing(Rendering, Prompted):
    """How pictures of a prompt are drawn."""
