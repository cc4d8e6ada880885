"""What a user may ask of the block probe."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ProbeSpec(BaseModel):
    """One measurement of what each attention block of a base model carries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    pairs: int = Field(
        24,
        ge=1,
        le=1000,
        description="Prompt pairs that differ in subject, and as many that differ in style.",
    )
    groups: tuple[str, ...] = Field(
        (),
        description="Blocks probed together, joined by '+', such as "
        "'mid_block.attentions.0+up_blocks.1.attentions.0'; default: each block alone.",
    )
    evaluator: bool | None = Field(
        None,
        description="Ask the starters' words and let their evaluator say what pictures show; default: for an "
        "embedded base only.",
    )
    clip: str | None = Field(
        None, description="Folder or hub id of a CLIP model that measures pictures against prompts, too."
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
    seed: int = Field(0, ge=0, lt=2**62, description="Seed of the choice of words and of the first pair.")
    batch_size: int = Field(8, ge=1, le=1024, description="Pictures drawn at once.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Number type; auto: fp32 on the CPU, fp16 on a GPU."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    output: Path = Field(Path("probe"), description="Folder of the table and the two pictures.")
    overwrite: bool = Field(False, description="Replace a table that is there.")
