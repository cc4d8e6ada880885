"""A cheap name for a base model's weights, written into adapters that were trained on it."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 64


def fingerprint(pipe: Any) -> str:
    """Return a sha256 over the UNet's configuration, its parameters' names, shapes and sampled values.

    Costs a fraction of a second and one transfer from a GPU. The values are taken in the type they have: a
    model loaded in fp16 and in fp32 differ where rounding shows. Inside ``compose`` it is that of the
    composed weights.
    """
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples = []
    for name, parameter in sorted(unet.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        samples.append(_sample(parameter))
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    """Return up to 64 values, evenly spread, as fp32 ``[n]``."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float()
