"""The base of the last run, kept for the next one, and how a request has it compute."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from studio.models.base import load_base
from studio.models.device import resolve_device, resolve_dtype
from studio.models.execution import attention, check_attention, check_offload, compiled, offloaded, tiled
from studio.trainers.processes import Processes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from studio.specs import GenerateSpec, TrainSpec
    from studio.specs.execution import Quantization

_BASES: "OrderedDict[tuple[str, str, str, str], DiffusionPipeline]" = OrderedDict()
_KEPT_BASES = 1
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def cached_base(
    base: str, device: str, precision: str, quantize_base: "Quantization" = "none"
) -> "DiffusionPipeline":
    """Return the pipeline of the last run if it is the same, else load it and let the older one go first.

    Raises:
        BaseModelError: If it cannot be loaded.
        UsageError: If the device or the precision does not exist, or weights cannot be quantised here.
    """
    place = resolve_device(device)
    key = (base, str(place), str(resolve_dtype(precision, place)), quantize_base)
    if key not in _BASES:
        while len(_BASES) >= _KEPT_BASES:
            _BASES.popitem(last=False)
        _BASES[key] = load_base(base, device=device, precision=precision, quantize_base=quantize_base)
    _BASES.move_to_end(key)
    return _BASES[key]


def base_to_train(spec: "TrainSpec", processes: Processes) -> "DiffusionPipeline":
    """Return the base of a training run, for this process.

    Raises:
        BaseModelError: If it cannot be loaded.
        TrainingError: If there are more processes than GPUs.
        UsageError: If it cannot compute as asked on this machine.
    """
    place = processes.own(resolve_device(spec.device), asked=spec.device)
    check_attention(spec.attention, place)
    # The CPU trains from fp32 weights whatever the forward pass computes in.
    precision = "fp32" if place.type == "cpu" else spec.precision
    return cached_base(spec.base, str(place), precision, spec.quantize_base)


def base_to_draw(spec: "GenerateSpec") -> "DiffusionPipeline":
    """Return the base of a request, on the CPU where its parts are to be brought to the device in turn.

    Raises:
        BaseModelError: If it cannot be loaded.
        UsageError: If it cannot compute as asked on this machine.
    """
    place = resolve_device(spec.device)
    check_attention(spec.attention, place)
    check_offload(spec.offload, place, quantized=spec.quantize_base != "none")
    if spec.offload == "none":
        return cached_base(spec.base, spec.device, spec.precision, spec.quantize_base)
    # The number type is the device's own, wherever the weights wait.
    precision = _PRECISIONS[resolve_dtype(spec.precision, place)]
    return cached_base(spec.base, "cpu", precision, spec.quantize_base)


@contextmanager
def execution(pipe: "DiffusionPipeline", spec: "GenerateSpec") -> Iterator[None]:
    """Have a base compute as a request asks; afterwards as before."""
    with (
        attention(pipe.unet, spec.attention),
        compiled(pipe.unet, spec.compile),
        tiled(pipe.vae, spec.vae_tiling),
        offloaded(pipe, spec.offload, resolve_device(spec.device)),
    ):
        yield
