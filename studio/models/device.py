"""Where a model runs, in which number type, and what it leaves of memory to the next."""

import gc
from typing import Literal

import torch

from studio.errors import UsageError

Precision = Literal["auto", "fp32", "fp16", "bf16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device; "auto" is the first GPU that there is, else the CPU.

    Raises:
        UsageError: If the name is unknown or this machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(
            f"device: unknown '{device}'. Choose auto, cpu, cuda, cuda:1 (and so on) or mps."
        ) from None
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type, 0)
    if (found.index or 0) >= present:
        raise UsageError(f"device: this machine has no '{device}' that PyTorch can use. Choose auto or cpu.")
    return found


def resolve_dtype(precision: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """Return the number type; "auto" is fp32 on the CPU and fp16 on a GPU.

    Raises:
        UsageError: If the name is unknown.
    """
    if precision == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.float16
    if precision not in _DTYPES:
        raise UsageError(f"precision: unknown '{precision}'. Choose auto, fp32, fp16 or bf16.")
    return _DTYPES[precision]


def has_bf16(device: torch.device) -> bool:
    """Return whether a GPU computes in bf16 itself; some older ones imitate it, slowly."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def release_memory() -> None:
    """Let go of what only reference cycles hold, and of the memory that PyTorch keeps ready on a GPU."""
    gc.collect()
    for device in (torch.cuda, torch.mps):
        if device.is_available():
            device.empty_cache()
