"""The files of a diffusers pipeline, in a folder or on the hub: which it needs, and in which variant."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from studio.errors import BaseModelError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_NETWORKS = ("unet", "vae", "text_encoder")
_STEMS = ("diffusion_pytorch_model", "model")
_TEXT = (".json", ".txt", ".model")

Config = Mapping[str, Any]
"""What ``model_index.json`` holds."""
Files = Mapping[str, Sequence[str]]
"""Names of files by the pipeline's part."""


def check_class(where: str, config: Config) -> None:
    """Check that a pipeline is of a kind that we know.

    Args:
        where: Its folder or hub id.
        config: Its index.

    Raises:
        BaseModelError: If not.
    """
    kind = config.get("_class_name")
    if kind not in PIPELINES:
        raise BaseModelError(
            f"{where} holds a {kind}, wanted {' or '.join(PIPELINES)} (SD 1.x, SD 2.x, SDXL)."
        )


def by_part(paths: Iterable[str]) -> Files:
    """Return the files of each part of a pipeline, of all its files' paths."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        part, _, name = path.partition("/")
        if name and "/" not in name:
            found.setdefault(part, []).append(name)
    return found


def files_in(folder: Path) -> Files:
    """Return the files of each part of a pipeline's folder."""
    return by_part(
        [f"{part.name}/{file.name}" for part in folder.iterdir() if part.is_dir() for file in part.iterdir()]
    )


def check_files(where: str, config: Config, files: Files, *, sixteen_bit: bool) -> str | None:
    """Return the variant ("fp16") of the weights to load, None for the plain one.

    Args:
        where: Folder or hub id.
        config: The pipeline's index.
        files: That are there.
        sixteen_bit: Whether files of 16 bits are better than others, being all that is held of those.

    Raises:
        BaseModelError: If a part or its weights are missing, or there as pickles only.
    """
    variants: list[set[str | None]] = []
    for part in _parts(config):
        if part not in files:
            raise BaseModelError(f"{where} lacks its part '{part}'. Get it again.")
        if not part.startswith(_NETWORKS):
            continue
        weights = _weights(files[part])
        if not weights:
            pickles = [name for name in files[part] if name.endswith(PICKLES)]
            found = (
                f"only {pickles[0]}, a pickle, which can run code when it is read"
                if pickles
                else "no weights"
            )
            raise BaseModelError(
                f"{where}/{part} holds {found}. Wanted .safetensors: get that form of the model."
            )
        variants.append({_variant(name) for name in weights})
    named = sorted({variant for each in variants for variant in each if variant})
    order = ["fp16", None, *named] if sixteen_bit else [None, "fp16", *named]
    fitting = [variant for variant in order if _fits(variant, variants)]
    if not fitting:
        raise BaseModelError(
            f"the parts of {where} hold weights in different variants ({', '.join(named)}). Get those of one."
        )
    return fitting[0]


def needed(config: Config, files: Files, variant: str | None) -> Iterator[str]:
    """Return the paths of what a pipeline is loaded from.

    Args:
        config: The pipeline's index.
        files: That there are.
        variant: Of the weights; parts that do not have it are loaded from the plain ones.
    """
    yield "model_index.json"
    for part in _parts(config):
        weights = _weights(files[part])
        own = variant if any(_variant(name) == variant for name in weights) else None
        for name in files[part]:
            if name.endswith(_TEXT) or (name in weights and _variant(name) == own):
                yield f"{part}/{name}"


def _parts(config: Config) -> list[str]:
    return [
        name for name, kind in config.items() if name not in UNUSED and isinstance(kind, list) and kind[0]
    ]


def _weights(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") and name.startswith(_STEMS)]


def _variant(name: str) -> str | None:
    """Return what stands between a file's stem and its ending: ``model.fp16.safetensors``."""
    middle = re.sub(r"-\d{5}-of-\d{5}", "", name).split(".")[1:-1]
    return middle[0] if middle else None


def _fits(variant: str | None, found: Sequence[Collection[str | None]]) -> bool:
    """Return whether a part has a variant, and all others that or plain files to load instead."""
    return any(variant in each for each in found) and all(variant in each or None in each for each in found)
