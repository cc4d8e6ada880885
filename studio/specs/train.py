"""What a user may ask of training."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from studio.errors import UsageError
from studio.registry import FORMATS, TRAINERS, Registry
from studio.specs.base import MethodSpec, complete


class TrainSpec(MethodSpec):
    """One training run. Fields below, plus the options of the chosen method."""

    registry: ClassVar[Registry[Any]] = TRAINERS

    base: str = Field(
        "starter",
        description="Base model: 'starter', a diffusers folder, a .safetensors checkpoint or a hub id.",
    )
    data: Path = Field(description="Folder of pictures; a caption may lie beside each as a .txt file.")
    prompt: str | None = Field(
        None, description="Caption of pictures that have none, with the trigger word in it."
    )
    method: str = Field("lora", description="Training method.")
    output: Path = Field(description="Adapter file to write (.safetensors).")
    format: str = Field(
        "kohya", description="File format of the output: 'kohya' (other tools) or 'diffusers'."
    )
    overwrite: bool = Field(False, description="Replace the output if it exists.")
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        multiple_of=8,
        description="Side of training pictures in pixels; default: the base's own.",
    )
    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(2, ge=1, description="Pictures per forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Trade time for memory in the backward pass.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Learning rate of the UNet's adapter.")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Learning rate of the text encoders' adapter; default: half the UNet's."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the learning rate rises from zero.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    min_snr_gamma: float | None = Field(
        5.0, gt=0, description="Min-SNR loss weighting's gamma, arXiv:2303.09556; none turns it off."
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of samples trained without their caption."
    )
    flip: bool = Field(
        False, description="Mirror pictures at random; off for asymmetric subjects and lettering."
    )
    center_crop: bool = Field(True, description="Crop from the middle; otherwise at random.")
    skip_bad: bool = Field(False, description="Go on without pictures that cannot be read.")
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of noise, timesteps, crops and the adapter's start."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Number type of the forward pass; auto: fp32 on the CPU, bf16 or fp16 on a GPU."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    sample_every: int = Field(0, ge=0, description="Draw sample pictures every so many steps; 0: never.")
    sample_prompts: tuple[str, ...] = Field(
        (), description="Prompts of the samples; default: the training prompt."
    )
    sample_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of the samples.")
    save_every: int = Field(
        0, ge=0, description="Write the adapter so far every so many steps; 0: at the end and on a stop only."
    )
    author: str | None = Field(None, description="Author written into the file's metadata.")

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        try:
            FORMATS[name]
        except UsageError as error:
            raise complete(str(error)) from None
        return name

    @field_validator("output")
    @classmethod
    def _safetensors(cls, path: Path) -> Path:
        if path.suffix != ".safetensors":
            raise ValueError("must be a file name that ends in .safetensors")
        return path
