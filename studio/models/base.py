"""Base models: find and load them as ordinary diffusers pipelines, from safetensors only."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from studio.errors import BaseModelError
from studio.models.architecture import Architecture, architecture
from studio.models.device import resolve_device, resolve_dtype
from studio.models.fingerprint import fingerprint
from studio.models.quantization import check_quantization, quantize
from studio.models.schedulers import make_scheduler
from studio.registry import nearest
from studio.specs.execution import Quantization

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Architecture",
    "architecture",
    "fingerprint",
    "load_base",
    "make_scheduler",
    "starter_path",
]

STARTERS = ("starter",)
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_KINDS = "'starter', a diffusers folder, a .safetensors checkpoint or a hub id such as owner/name"


def starter_path(name: str = "starter") -> Path:
    """Return the folder of an embedded base model, a part of the installed package.

    Raises:
        BaseModelError: If this installation lacks it.
    """
    folder = Path(str(files("studio.assets"))) / name
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"this installation lacks the embedded base model '{name}'. Install the package again, or choose "
            "another base."
        )
    return folder


def load_base(
    base: str | Path, *, device: str = "auto", precision: str = "auto", quantize_base: Quantization = "none"
) -> "DiffusionPipeline":
    """Return a base model as an ordinary diffusers pipeline, its progress bars off, no safety checker.

    Args:
        base: "starter", a diffusers folder, a single .safetensors checkpoint, or a hub id.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto" (fp32 on the CPU, fp16 on a GPU), "fp32", "fp16", "bf16".
        quantize_base: "int8" or "nf4" holds the UNet's transformer blocks in 8 or 4 bits (bitsandbytes).

    Raises:
        BaseModelError: If the base cannot be found, read or used.
        UsageError: If the device or the precision does not exist, or weights cannot be quantised here.
    """
    place = resolve_device(device)
    dtype = resolve_dtype(precision, place)
    check_quantization(quantize_base, place)
    source = find_base(base)
    with bars_off():
        if isinstance(source, str):
            pipe = _from_hub(source, dtype)
        elif source.is_dir():
            pipe = _from_folder(source, dtype)
        else:
            pipe = _from_single_file(source, dtype)
    architecture(pipe)
    if quantize_base != "none":
        quantize(pipe.unet, quantize_base, device=place)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def find_base(base: str | Path) -> Path | str:
    """Return the folder or the file, or the hub id as text, that a base's name stands for.

    Raises:
        BaseModelError: If it stands for nothing, or for a file of a refused kind.
    """
    text = str(base)
    if text in STARTERS:
        return starter_path(text)
    path = Path(text).expanduser()
    if path.suffix in _PICKLES:
        raise BaseModelError(
            f"{path} is a pickle, which can run code when it is read. Only .safetensors is read: convert it, "
            "or get that form."
        )
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BaseModelError(f"{path} is not a base model. Give {_KINDS}.")
        return path
    if (
        isinstance(base, str)
        and _HUB_ID.fullmatch(text)
        and path.suffix != ".safetensors"
        and not path.parent.is_dir()
    ):
        return text
    raise BaseModelError(f"base model '{text}' does not exist.{_nearest_base(path, text)} Give {_KINDS}.")


def _nearest_base(path: Path, text: str) -> str:
    if len(path.parts) < 2:
        return nearest(text.lower(), list(STARTERS))
    beside = {entry.name: entry for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.name, list(beside), n=1)
    return f" Did you mean '{beside[close[0]]}'?" if close else ""


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        near = [folder.parent] if (folder.parent / index.name).is_file() else []
        near = (
            near
            or sorted(entry.parent for entry in folder.glob("*/model_index.json"))
            or sorted(folder.glob("*.safetensors"))
        )
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise BaseModelError(f"{folder} has no model_index.json, so it is not a diffusers folder.{hint}")
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{index} is not readable as JSON ({error}). Get the folder again.") from None
    _check_class(str(folder), config)
    variant = _check_weights(folder, config)
    return _from_pretrained(str(folder), config, dtype, variant=variant, local_files_only=True)


def _check_class(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind not in _PIPELINES:
        raise BaseModelError(
            f"{name} holds a {kind}, wanted {' or '.join(_PIPELINES)} (SD 1.x, SD 2.x, SDXL)."
        )


def _check_weights(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the variant ("fp16") that the folder's weights come in, None for the plain one.

    Raises:
        BaseModelError: If a component's weights are missing, or there as pickles only.
    """
    variants: set[str | None] = set()
    for name, kind in config.items():
        if name in _UNUSED or not isinstance(kind, list) or not kind[0]:
            continue
        if not (folder / name).is_dir():
            raise BaseModelError(f"{folder} lacks its part '{name}'. Get the folder again.")
        if not name.startswith(("unet", "vae", "text_encoder")):
            continue
        weights = [entry.name for entry in (folder / name).glob("*.safetensors")]
        if not weights:
            pickles = [entry.name for entry in (folder / name).glob("*") if entry.suffix in _PICKLES]
            found = (
                f"only {pickles[0]}, a pickle, which can run code when it is read"
                if pickles
                else "no weights"
            )
            raise BaseModelError(
                f"{folder / name} holds {found}. Wanted .safetensors: get that form of the model."
            )
        variants.add(_variant(weights))
    named = sorted(variant for variant in variants if variant)
    return named[0] if named else None


def _variant(weights: list[str]) -> str | None:
    """Return what stands between stem and suffix when no file goes without: ``model.fp16.safetensors``."""
    middles = [re.sub(r"-\d{5}-of-\d{5}", "", name).split(".")[1:-1] for name in weights]
    return None if any(not middle for middle in middles) else middles[0][0]


def _from_pretrained(name: str, config: Mapping[str, Any], dtype: torch.dtype, **where: Any) -> Any:
    import diffusers

    unchecked = (
        {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
    )
    kind = getattr(diffusers, config["_class_name"])
    try:
        return kind.from_pretrained(name, dtype=dtype, use_safetensors=True, **unchecked, **where)
    except Exception as error:
        raise BaseModelError(
            f"base model '{name}' cannot be loaded ({_first_line(error)}). Get its files again."
        ) from error


def _from_hub(name: str, dtype: torch.dtype) -> Any:
    from huggingface_hub import hf_hub_download

    try:
        config = json.loads(Path(hf_hub_download(name, "model_index.json")).read_text(encoding="utf-8"))
    except Exception as error:
        raise BaseModelError(
            f"base model '{name}' is not a folder here, and the hub did not give it ({_first_line(error)}). "
            "Check the spelling and, for a gated model, 'hf auth login'; without a network only models "
            "fetched before can be used."
        ) from error
    _check_class(name, config)
    return _from_pretrained(name, config, dtype)


def _from_single_file(path: Path, dtype: torch.dtype) -> Any:
    """Load one file; configuration and tokenizer come from ``NAME.config/`` beside it or from the hub."""
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path} is not a readable safetensors file ({_first_line(error)}). Get it again."
        ) from None
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise BaseModelError(
            f"{path} holds {len(keys)} tensors but no complete base model (no 'model.diffusion_model.' "
            "keys). An adapter goes to --adapter; a base is a whole checkpoint."
        )
    sdxl = any(key.startswith("conditioner.embedders.") for key in keys)
    kind: Any = getattr(diffusers, _PIPELINES[int(sdxl)])
    beside = path.with_suffix(".config")
    extra: dict[str, Any] = {"config": str(beside), "local_files_only": True} if beside.is_dir() else {}
    unchecked = {} if sdxl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        return kind.from_single_file(str(path), dtype=dtype, **extra, **unchecked)
    except Exception as error:
        raise BaseModelError(
            f"{path} cannot be loaded ({_first_line(error)}). A single file lacks configuration and "
            f"tokenizer: they are fetched from the hub once, or read from a folder '{beside.name}' beside it "
            "- a diffusers folder of the same architecture, weights not needed."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextmanager
def bars_off() -> Iterator[None]:
    """Keep the libraries' bars of loading and saving off for a while."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
