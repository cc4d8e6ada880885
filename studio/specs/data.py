"""What a user may ask of the pictures that a run is trained on."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.specs.base import MethodSpec, complete


class DataSpec(MethodSpec):
    """Pictures and captions of a run, and how its samples are made of them."""

    data: Path = Field(
        description="Pictures: a folder (a caption may lie beside each as a .txt file, or all in a "
        "metadata.jsonl), a folder of kohya's N_name folders, or a kohya data set TOML."
    )
    prompt: str | None = Field(
        None, description="Caption of pictures that have none, with the trigger word in it."
    )
    trigger: str | None = Field(
        None, min_length=1, description="Trigger word put in front of every caption that does not hold it."
    )
    caption_extension: str = Field(
        ".txt",
        pattern=r"^\..+$",
        description="Ending of the caption files; '.*' takes the one of any ending that lies beside the "
        "picture.",
    )
    tag_separator: str = Field(",", min_length=1, description="What stands between the tags of a caption.")
    shuffle_tags: bool = Field(False, description="Put the tags of a caption in another order each time.")
    keep_tags: int = Field(0, ge=0, description="So many tags at the front are neither shuffled nor dropped.")
    tag_dropout: float = Field(0.0, ge=0, le=1, description="Chance of each tag to be left out of a sample.")
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of samples trained without their caption."
    )
    max_token_length: int | None = Field(
        None,
        ge=1,
        description="Read at most so many tokens of a caption, such as 75, 150 or 225, and leave the rest "
        "out; default: all. Each further 75 are encoded as a chunk of their own, as in prompts of drawing.",
    )
    resolution: int | None = Field(
        None,
        ge=16,
        le=4096,
        multiple_of=8,
        description="Side of training pictures in pixels, of those that are not square the side of a square "
        "of the same area; default: the base's own.",
    )
    buckets: bool = Field(
        True,
        description="Train pictures that are not square in about their own shape; otherwise a square is cut "
        "from each.",
    )
    bucket_step: int | None = Field(
        None,
        ge=8,
        description="Sides of the buckets are multiples of so many pixels; default: 8 latents, 64 px for SD "
        "and SDXL.",
    )
    bucket_min: int | None = Field(
        None, ge=8, description="Shortest side of a bucket in pixels; default: half the resolution."
    )
    bucket_max: int | None = Field(
        None, ge=8, description="Longest side of a bucket in pixels; default: twice the resolution."
    )
    bucket_upscale: bool = Field(
        True, description="Enlarge small pictures to their bucket; otherwise they get one of their own size."
    )
    flip: bool = Field(
        False, description="Mirror pictures at random; off for asymmetric subjects and lettering."
    )
    center_crop: bool = Field(True, description="Crop from the middle; otherwise at random.")
    color_jitter: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Brightness, contrast and saturation are multiplied by random factors that differ from 1 "
        "by at most this.",
    )
    masks: Literal["file", "alpha", "off"] = Field(
        "file",
        description="Where the loss counts: white parts of mask files (NAME.mask.png, NAME-mask.png or "
        "mask/NAME.png) where there are any, opaque parts of the pictures, or everywhere.",
    )
    unmasked_weight: float = Field(
        0.0, ge=0, le=1, description="Weight of the loss where a mask is black; 1 makes masks do nothing."
    )
    validation_split: float = Field(
        0.0, ge=0, lt=1, description="Share of the pictures held out of training to measure the loss on."
    )
    validation_data: Path | None = Field(
        None, description="Folder of pictures to measure the loss on, instead of a share of the others."
    )
    cache: Literal["memory", "disk", "off"] = Field(
        "memory",
        description="Where encoded pictures and captions are kept: for this run, for later runs too, or "
        "nowhere. It changes no result.",
    )
    cache_folder: Path | None = Field(
        None, description="Folder of the cache on disk; default: in the workspace (STUDIO_HOME)."
    )
    skip_bad: bool = Field(False, description="Go on without pictures that cannot be read.")

    @field_validator("validation_data")
    @classmethod
    def _one_way_to_validate(cls, folder: Path | None, info: ValidationInfo) -> Path | None:
        if folder is not None and info.data.get("validation_split"):
            raise complete("validation_split holds pictures out already. Give one of the two.")
        return folder

    @field_validator("bucket_max")
    @classmethod
    def _room_between(cls, largest: int | None, info: ValidationInfo) -> int | None:
        smallest = info.data.get("bucket_min")
        if largest is not None and smallest is not None and largest < smallest:
            raise complete(f"must be at least bucket_min ({smallest}), got {largest}.")
        return largest
