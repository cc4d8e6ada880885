"""Put the parts of a work folder together as the diffusers folder that is shipped."""

import hashlib
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from studio.assets.builder.recipe import Recipe
from studio.assets.builder.tokenizer import save_tokenizer
from studio.assets.builder.unet import new_scheduler

SHARD = "15MB"  # of weights, so that no file is above 16 MB


def load_text_encoders(recipe: Recipe, work: Path, dtype: torch.dtype) -> list[PreTrainedModel]:
    """Return the trained text encoders of a work folder."""
    kinds = [CLIPTextModelWithProjection if spec.projected else CLIPTextModel for spec in recipe.texts]
    return [
        kind.from_pretrained(work / f"text_encoder_{number}", dtype=dtype)
        for number, kind in enumerate(kinds, 1)
    ]


def publish(recipe: Recipe, work: Path, folder: Path, *, shard: str = SHARD) -> None:
    """Write the diffusers folder in fp16.

    Args:
        recipe: What was built.
        work: Folder of its parts.
        folder: Folder to write.
        shard: Largest file of weights, as diffusers spells it.
    """
    encoders = load_text_encoders(recipe, work, torch.float16)
    parts = {
        "vae": AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float16),
        "text_encoder": encoders[0],
        "tokenizer": CLIPTokenizer.from_pretrained(work / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(work / "unet", torch_dtype=torch.float16),
        "scheduler": new_scheduler(),
    }
    pipeline: DiffusionPipeline
    if recipe.sdxl:
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder_2=encoders[1], tokenizer_2=CLIPTokenizer.from_pretrained(work / "tokenizer")
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    # Shards of an earlier, longer list would be left behind.
    for old in folder.glob("*/*.safetensors*"):
        old.unlink()
    for part in (pipeline.vae, pipeline.unet):
        # Where the work folder was on the machine that built it is nobody's business.
        part.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder, max_shard_size=shard)
    for place in sorted(folder.glob("tokenizer*")):
        save_tokenizer(pipeline.tokenizer, place)


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a shipped folder but its card, by path within the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
