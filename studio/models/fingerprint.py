"""A cheap name for a base model's weights, written into adapters that were trained on it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from studio.models.quantization import KEPT_SAMPLES, sampled, weight_shape


def fingerprint(pipe: Any, *, dtypes: Sequence[torch.dtype] = ()) -> str:
    """Return a sha256 over the UNet's configuration, its parameters' names, shapes and sampled values.

    Costs a fraction of a second and one transfer from a GPU. Inside ``compose`` it is that of the composed
    weights; of a quantised UNet it is that of the weights before.

    Args:
        pipe: The base.
        dtypes: What the values are rounded to first, in this order; without any they are taken as they are,
            so that a model loaded in fp16 and in fp32 differ where rounding shows.
    """
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    before: Mapping[str, Tensor] = getattr(unet, KEPT_SAMPLES, {})
    samples = []
    for name, parameter in sorted(unet.named_parameters()):
        digest.update(f"{name} {weight_shape(parameter)}\n".encode())
        values = before[name].to(parameter.device) if name in before else sampled(parameter)
        for dtype in dtypes:
            values = values.to(dtype)
        samples.append(values.float())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()
