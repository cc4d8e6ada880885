"""What a user may ask of zipping a content and a style adapter into one."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from studio.registry import FORMATS
from studio.specs.checks import ends_in, known_in
from studio.specs.composition import AdapterUse, refuse_same_file


class ZipSpec(BaseModel):
    """One adapter that draws the content of one and the style of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: AdapterUse = Field(description="Adapter file of the content, path or path:weight.")
    style: AdapterUse = Field(description="Adapter file of the style, path or path:weight.")
    content_prompt: str = Field(description="What the content's pictures show, with its trigger words.")
    style_prompt: str = Field(description="What the style's pictures show, with its trigger words.")
    output: Annotated[Path, ends_in(".safetensors")] = Field(
        description="Adapter file to write (.safetensors)."
    )
    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    content_data: Path | None = Field(
        None, description="Folder of pictures of the content; default: the content's adapter draws some."
    )
    style_data: Path | None = Field(
        None, description="Folder of pictures of the style; default: the style's adapter draws some."
    )
    pictures: int = Field(4, ge=1, le=1000, description="Pictures that an adapter draws without a folder.")
    sample_steps: int = Field(25, ge=1, le=1000, description="Denoising steps of those pictures.")
    steps: int = Field(100, ge=1, le=100_000, description="Optimizer steps.")
    learning_rate: float = Field(1e-2, gt=0, le=1, description="Of the columns' weights, which start at 1.")
    penalty: float = Field(
        0.01,
        ge=0,
        description="Weight of the overlap in the loss: the mean of |m_c m_s| over a layer's columns, summed "
        "over layers (lambda).",
    )
    resolution: int | None = Field(
        None, ge=16, le=4096, multiple_of=8, description="Side in pixels; default: the base's own."
    )
    seed: int = Field(0, ge=0, lt=2**62, description="Seed of pictures, noise and timesteps.")
    gradient_checkpointing: bool = Field(
        False, description="Compute parts of the UNet again instead of keeping them: less memory, slower."
    )
    format: Annotated[str, known_in(FORMATS)] = Field(
        "kohya", description="File format of the output: 'kohya' (other tools), 'diffusers'."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Number type of the base; auto: fp32 on the CPU, fp16 on a GPU."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    any_base: bool = Field(False, description="Take an adapter that names another base.")
    overwrite: bool = Field(False, description="Replace the output.")

    @field_validator("content", "style", mode="before")
    @classmethod
    def _use(cls, given: Any) -> Any:
        return AdapterUse.parse(str(given)) if isinstance(given, (str, Path)) else given

    @field_validator("style")
    @classmethod
    def _another(cls, style: AdapterUse, info: ValidationInfo) -> AdapterUse:
        if "content" in info.data:
            refuse_same_file((info.data["content"], style))
        return style
