"""Base models: find and load them as ordinary diffusers pipelines, from safetensors only."""

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from studio.errors import BaseModelError
from studio.models.architecture import Architecture, architecture
from studio.models.device import resolve_device, resolve_dtype
from studio.models.fingerprint import fingerprint
from studio.models.folder_files import PICKLES, PIPELINES, UNUSED, Config, check_class, check_files, files_in
from studio.models.hub import fetched, first_line
from studio.models.quantization import check_quantization, quantize
from studio.models.schedulers import make_scheduler
from studio.registry import nearest
from studio.specs.events import OnEvent, silent
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
    base: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    quantize_base: Quantization = "none",
    on_event: OnEvent | None = None,
) -> "DiffusionPipeline":
    """Return a base model as an ordinary diffusers pipeline, its progress bars off, no safety checker.

    In bf16 its weights are those of fp16, rounded: a base is one and the same in whichever type of 16 bits.

    Args:
        base: "starter", a diffusers folder, a single .safetensors checkpoint, or a hub id.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto" (fp32 on the CPU, fp16 on a GPU), "fp32", "fp16", "bf16".
        quantize_base: "int8" or "nf4" holds the UNet's transformer blocks in 8 or 4 bits (bitsandbytes).
        on_event: Told before files are downloaded.

    Raises:
        BaseModelError: If the base cannot be found, read or used.
        UsageError: If the device or the precision does not exist, or weights cannot be quantised here.
    """
    place = resolve_device(device)
    dtype = resolve_dtype(precision, place)
    check_quantization(quantize_base, place)
    source = find_base(base)
    stored = torch.float32 if dtype == torch.float32 else torch.float16
    with bars_off():
        if isinstance(source, str):
            folder = fetched(source, sixteen_bit=stored == torch.float16, on_event=on_event or silent)
            pipe = _from_folder(folder, stored, name=source)
        elif source.is_dir():
            pipe = _from_folder(source, stored, name=str(source))
        else:
            pipe = _from_single_file(source, stored)
    architecture(pipe)
    if dtype != stored:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)
    if quantize_base != "none":
        quantize(pipe.unet, quantize_base, device=place)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place, silence_dtype_warnings=True)


def find_base(base: str | Path) -> Path | str:
    """Return the folder or the file, or the hub id as text, that a base's name stands for.

    Raises:
        BaseModelError: If it stands for nothing, or for a file of a refused kind.
    """
    text = str(base)
    if text in STARTERS:
        return starter_path(text)
    path = Path(text).expanduser()
    if path.suffix in PICKLES:
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


def _from_folder(folder: Path, dtype: torch.dtype, *, name: str) -> Any:
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
    check_class(name, config)
    sixteen_bit = dtype == torch.float16
    variant = check_files(name, config, files_in(folder), sixteen_bit=sixteen_bit)
    return _from_pretrained(folder, config, dtype, variant=variant, name=name)


def _from_pretrained(
    folder: Path, config: Config, dtype: torch.dtype, *, variant: str | None, name: str
) -> Any:
    import diffusers

    without: dict[str, Any] = {part: None for part in UNUSED if part in config}
    if "safety_checker" in config:
        without["requires_safety_checker"] = False
    kind = getattr(diffusers, config["_class_name"])
    try:
        return kind.from_pretrained(
            str(folder),
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            **without,
        )
    except Exception as error:
        raise BaseModelError(
            f"base model '{name}' cannot be loaded ({first_line(error)}). Get its files again."
        ) from error


def _from_single_file(path: Path, dtype: torch.dtype) -> Any:
    """Load one file; configuration and tokenizer come from ``NAME.config/`` beside it or from the hub."""
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path} is not a readable safetensors file ({first_line(error)}). Get it again."
        ) from None
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise BaseModelError(
            f"{path} holds {len(keys)} tensors but no complete base model (no 'model.diffusion_model.' "
            "keys). An adapter goes to --adapter; a base is a whole checkpoint."
        )
    sdxl = any(key.startswith("conditioner.embedders.") for key in keys)
    kind: Any = getattr(diffusers, PIPELINES[int(sdxl)])
    beside = path.with_suffix(".config")
    extra: dict[str, Any] = {"config": str(beside), "local_files_only": True} if beside.is_dir() else {}
    unchecked = {} if sdxl else {"safety_checker": None, "requires_safety_checker": False}
    try:
        return kind.from_single_file(str(path), dtype=dtype, **extra, **unchecked)
    except Exception as error:
        raise BaseModelError(
            f"{path} cannot be loaded ({first_line(error)}). A single file lacks configuration and "
            f"tokenizer: they are fetched from the hub once, or read from a folder '{beside.name}' beside it "
            "- a diffusers folder of the same architecture, weights not needed."
        ) from error


@contextmanager
def bars_off() -> Iterator[None]:
    """Keep the libraries' bars of loading and saving off for a while; those of downloads stay."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub_utils
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    # Not exported in a way that type checkers see.
    hub: Any = hub_utils
    downloads = not hub.are_progress_bars_disabled()
    for library in shown:
        library.disable_progress_bar()
    if downloads:
        # transformers turns them off with its own.
        hub.enable_progress_bars()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
