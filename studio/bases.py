"""The base of the last run, kept for the next one, and how a request has it compute."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from studio.composition import facts
from studio.errors import BaseModelError
from studio.models.base import find_base, fingerprint, load_base
from studio.models.clip_skip import clip_skipped
from studio.models.device import release_memory, resolve_device, resolve_dtype
from studio.models.execution import attention, check_attention, check_offload, compiled, offloaded, tiled
from studio.specs.events import OnEvent, silent
from studio.trainers.processes import Processes
from studio.trainers.runtime import best_precision

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from studio.specs import GenerateSpec, TrainSpec
    from studio.specs.execution import Quantization

_BASES: "OrderedDict[tuple[str, str, str, str], DiffusionPipeline]" = OrderedDict()
_KEPT_BASES = 1
_KIND = "base"
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def cached_base(
    base: str,
    device: str,
    precision: str,
    quantize_base: "Quantization" = "none",
    on_event: OnEvent = silent,
) -> "DiffusionPipeline":
    """Return the pipeline of the last run if it is the same, else load it and let the older one go first.

    Args:
        base: What ``load_base`` takes, as are device and precision.
        device: Where it is to be.
        precision: Its number type.
        quantize_base: What its transformer blocks are held in.
        on_event: Told before files are downloaded.

    Raises:
        BaseModelError: If it cannot be loaded.
        UsageError: If the device or the precision does not exist, or weights cannot be quantised here.
    """
    place = resolve_device(device)
    key = (base, str(place), str(resolve_dtype(precision, place)), quantize_base)
    if key not in _BASES:
        while len(_BASES) >= _KEPT_BASES:
            _BASES.popitem(last=False)
            release_memory()
        _BASES[key] = load_base(
            base, device=device, precision=precision, quantize_base=quantize_base, on_event=on_event
        )
        found = _files_of(base, device, precision)
        if found is not None and facts.get(_KIND, found) is None:
            facts.put(_KIND, found, {"fingerprint": fingerprint(_BASES[key])})
    _BASES.move_to_end(key)
    return _BASES[key]


def known_fingerprint(base: str, device: str, precision: str) -> str | None:
    """Return the fingerprint of a base without loading it; None if its files were never loaded as they are.

    Raises:
        UsageError: If the device or the precision does not exist.
    """
    found = _files_of(base, device, precision)
    known = None if found is None else facts.get(_KIND, found)
    return None if known is None else str(known["fingerprint"])


def base_to_train(spec: "TrainSpec", processes: Processes, on_event: OnEvent) -> "DiffusionPipeline":
    """Return the base of a training run, for this process.

    Args:
        spec: The run.
        processes: Those that train.
        on_event: Told before files are downloaded.

    Raises:
        BaseModelError: If it cannot be loaded.
        TrainingError: If there are more processes than GPUs.
        UsageError: If it cannot compute as asked on this machine.
    """
    place = processes.own(resolve_device(spec.device), asked=spec.device)
    check_attention(spec.attention, place)
    precision = best_precision(place) if spec.precision == "auto" else spec.precision
    # The CPU trains from fp32 weights whatever the forward pass computes in.
    precision = "fp32" if place.type == "cpu" else precision
    on_event = on_event if processes.main else silent
    return cached_base(spec.base, str(place), precision, spec.quantize_base, on_event)


def base_to_draw(spec: "GenerateSpec", on_event: OnEvent) -> "DiffusionPipeline":
    """Return the base of a request, on the CPU where its parts are to be brought to the device in turn.

    Args:
        spec: The request.
        on_event: Told before files are downloaded.

    Raises:
        BaseModelError: If it cannot be loaded.
        UsageError: If it cannot compute as asked on this machine.
    """
    place = resolve_device(spec.device)
    check_attention(spec.attention, place)
    check_offload(spec.offload, place, quantized=spec.quantize_base != "none")
    if spec.offload == "none":
        return cached_base(spec.base, spec.device, spec.precision, spec.quantize_base, on_event)
    # The number type is the device's own, wherever the weights wait.
    precision = _PRECISIONS[resolve_dtype(spec.precision, place)]
    return cached_base(spec.base, "cpu", precision, spec.quantize_base, on_event)


@contextmanager
def execution(pipe: "DiffusionPipeline", spec: "GenerateSpec") -> Iterator[None]:
    """Have a base read prompts and compute as a request asks; afterwards as before.

    Raises:
        UsageError: If it cannot read prompts so.
    """
    with (
        clip_skipped(pipe, spec.clip_skip),
        attention(pipe.unet, spec.attention),
        compiled(pipe.unet, spec.compile),
        tiled(pipe.vae, spec.vae_tiling),
        offloaded(pipe, spec.offload, resolve_device(spec.device)),
    ):
        yield


def _files_of(base: str, device: str, precision: str) -> str | None:
    """Return what tells a base's weights from others: files with size and time, number type."""
    dtype = resolve_dtype(precision, resolve_device(device))
    try:
        source = find_base(base)
        if isinstance(source, str):
            from huggingface_hub import try_to_load_from_cache

            index = try_to_load_from_cache(source, "model_index.json")
            if not isinstance(index, str):
                return None
            source = Path(index).parent
        own = source if source.is_dir() else source.with_suffix(".config")
        files = [*sorted((own / "unet").glob("*")), *([source] if source.is_file() else [])]
        stats = [(str(file.resolve()), file.stat()) for file in files]
    except (BaseModelError, OSError):
        return None
    return json.dumps([str(dtype), *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)])
