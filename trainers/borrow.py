"""A base lent to training and given back: the same tensors in the same places, whatever happens between."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from studio.errors import TrainingError

ALIGNMENT = 64
"""Bytes; torch's own tensors lie at multiples of it."""


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the pipeline's networks by component."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def refuse_adapters(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline whose networks hold layers of peft.

    Raises:
        TrainingError: If there are any.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(layer, BaseTunerLayer) for part in networks(pipe).values() for layer in part.modules()):
        raise TrainingError(
            "the pipeline has peft adapters loaded. Call pipe.unload_lora_weights() before training."
        )


@contextmanager
def borrowed(pipe: DiffusionPipeline, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Lend the pipeline frozen, on a device and in a number type; the autoencoder always in fp32.

    Nothing is copied back: the original tensors are kept aside and put into their parameters again, so the
    base is given back bit for bit, with its modes and flags, also after an exception. Only what wrote into
    those tensors in place could be seen afterwards, and frozen parameters are not written to.

    Raises:
        TrainingError: If the pipeline's parts are managed by offload hooks.
    """
    parts = networks(pipe)
    for name, part in parts.items():
        # Offloaded parameters lie on "meta", or are moved by hooks behind our back.
        if any(hasattr(module, "_hf_hook") for module in part.modules()) or any(
            p.is_meta for p in part.parameters()
        ):
            raise TrainingError(
                f"the pipeline's {name} is offloaded, which training cannot work with. "
                "Call pipe.remove_all_hooks(), or load the base again without offload."
            )
    lent = [_remember(part) for part in parts.values()]
    try:
        for name, part in parts.items():
            part.requires_grad_(False).eval()
            # A gradient of the caller's would have to follow the conversion.
            part.zero_grad(set_to_none=True)
            # Encoding in 16 bit overflows in SDXL's autoencoder, and it is a small part of the work.
            _convert(part, device, torch.float32 if name == "vae" else dtype)
        yield
    finally:
        for kept in lent:
            _give_back(kept)


@contextmanager
def converted(part: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold a network in a number type for the length of a block; its own tensors return afterwards."""
    kept = _remember(part)
    try:
        _convert(part, next(part.parameters()).device, dtype)
        yield
    finally:
        _give_back(kept)


def _remember(part: nn.Module) -> list[tuple[Any, ...]]:
    kept: list[tuple[Any, ...]] = []
    for module in part.modules():
        parameters = [(p, p.data, p.requires_grad, p.grad) for p in module.parameters(recurse=False)]
        # The attributes hold modes and flags, and would show marks that libraries leave behind. Hooks go
        # with them: transformers adds its own at the first call and marks the module, and without the mark
        # would add them again, which moves SDXL's penultimate hidden state to another layer.
        attributes = dict(vars(module))
        tables = [
            module._buffers,
            *(value for name, value in attributes.items() if _holds_hooks(name, value)),
        ]
        kept.append((module, parameters, [(table, dict(table)) for table in tables], attributes))
    return kept


def _holds_hooks(name: str, value: object) -> bool:
    return "_hooks" in name and isinstance(value, dict)


def _give_back(kept: list[tuple[Any, ...]]) -> None:
    for module, parameters, tables, attributes in kept:
        for parameter, data, requires_grad, grad in parameters:
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for table, entries in tables:
            table.clear()
            table.update(entries)
        vars(module).clear()
        vars(module).update(attributes)


def _convert(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    # nn.Module.to is asked directly: the libraries wrap it with warnings meant for other uses.
    nn.Module.to(part, device=device, dtype=dtype)
    # A file's tensors lie in memory as in the file. Matrix kernels round otherwise where the address is no
    # multiple of what they read at once: equal bases would train to different bits.
    for parameter in part.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
