"""How a pipeline computes, for the length of a block: attention, compilation, offload, tiles. Never what."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from studio.errors import UsageError
from studio.models.shadow import shadowed
from studio.specs.execution import Attention, Offload

BACKEND: str | Callable[..., Any] = "inductor"
"""torch.compile's backend."""
RECOMPILE_LIMIT = 64
"""Graphs of one block's code: all blocks share it, and differ in width, size, added layers and gradients.

torch's own limit of 8 is reached by a UNet with samples in between, and beyond it blocks run uncompiled.
"""

LARGEST_TILE = 512
"""Pixels of a side."""


def check_attention(kind: str, device: torch.device) -> None:
    """Check that attention can be computed in a way here.

    Raises:
        UsageError: If it is xformers, and that is not installed or the device no NVIDIA GPU.
    """
    if kind != "xformers":
        return
    if find_spec("xformers") is None:
        raise UsageError(
            "attention: xformers is not installed. Run pip install 'diffusion-studio[xformers]', or set "
            "attention to auto: PyTorch's own (sdpa) is about as good."
        )
    if device.type != "cuda":
        raise UsageError(f"attention: xformers needs a GPU, the device is '{device}'. Set attention to auto.")


@contextmanager
def attention(unet: Any, kind: Attention) -> Iterator[None]:
    """Compute a UNet's attention in a way for the length of a block; afterwards as before.

    Args:
        unet: Of diffusers.
        kind: "auto" leaves it as it is; "sdpa" is PyTorch's fused attention; "xformers" that of the package;
            "eager" forms all scores at once. See ``check_attention``.
    """
    if kind == "auto":
        yield
        return
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    before = unet.attn_processors
    try:
        if kind == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        else:
            unet.set_attn_processor(AttnProcessor2_0() if kind == "sdpa" else AttnProcessor())
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def compiled(unet: Any, wanted: bool = True) -> Iterator[None]:
    """Run a UNet's transformer blocks compiled for the length of a block.

    They are compiled one by one at their first calls, which takes far less time than the whole. What was
    compiled is found again by later blocks on the same UNet.

    Raises:
        UsageError: If they cannot be compiled on this machine.
    """
    if not wanted:
        yield
        return
    from torch import _dynamo

    try:
        # The limit is read when something is compiled, so it holds for the length of the block.
        with _dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            unet.compile_repeated_blocks(backend=BACKEND)
            yield
    except _dynamo.exc.TorchDynamoException as error:
        reason = getattr(error, "inner_exception", error)
        text = next(line for line in (*str(reason).splitlines(), type(reason).__name__) if line.strip())
        raise UsageError(
            f"compile: the UNet cannot be compiled here ({text.strip()}). It takes a C++ compiler on the "
            "CPU, Triton on a GPU (pip install 'diffusion-studio[gpu]'). Install that, or leave compile out."
        ) from error
    finally:
        for module in unet.modules():
            # Set by ``Module.compile``, which has no opposite.
            vars(module).pop("_compiled_call_impl", None)


def check_offload(kind: str, device: torch.device, *, quantized: bool) -> None:
    """Check that a pipeline can be offloaded.

    Raises:
        UsageError: If the device has no memory of its own, or the weights are quantised in a way that cannot
            be moved so.
    """
    if kind == "none":
        return
    if device.type in ("cpu", "meta"):
        raise UsageError(
            f"offload: '{kind}' moves weights between a GPU and the CPU, and the device is '{device}'. Leave "
            "offload out, or give a GPU as device."
        )
    if kind == "sequential" and quantized:
        raise UsageError(
            "offload: 'sequential' takes layers apart, which quantised ones do not survive. Use "
            "offload='model', or set quantize_base to none."
        )


@contextmanager
def offloaded(pipe: Any, kind: Offload, device: torch.device) -> Iterator[None]:
    """Keep a pipeline on the CPU for the length of a block and bring to the GPU what computes.

    Args:
        pipe: On the CPU; it lies there again afterwards.
        kind: "model" brings one network after the other, "sequential" one layer, which takes the least memory
            and by far the most time.
        device: The GPU.
    """
    if kind == "none":
        yield
        return
    try:
        if kind == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_sequential_cpu_offload(device=device)
        yield
    finally:
        pipe.remove_all_hooks()
        pipe.to("cpu", silence_dtype_warnings=True)


@contextmanager
def tiled(vae: Any, wanted: bool = True) -> Iterator[None]:
    """Have an autoencoder work tile by tile for the length of a block: less memory, seams are blended.

    SDXL's own tile is a whole picture of 1024 pixels, which would save nothing there.
    """
    if not wanted or vae.use_tiling:
        yield
        return
    share = min(1.0, LARGEST_TILE / vae.tile_sample_min_size)
    names = ("tile_sample_min_size", "tile_latent_min_size")
    with shadowed(vae, {"use_tiling": True, **{name: int(share * getattr(vae, name)) for name in names}}):
        yield


@contextmanager
def decoding(pipe: Any) -> Iterator[None]:
    """Let a pipeline in fp16 decode as its autoencoder wants, SDXL's in fp32; in fp16 again afterwards.

    diffusers casts the autoencoder there and back, warns of each, and leaves it there after an error.
    """
    vae = pipe.vae
    if vae.dtype != torch.float16 or not hasattr(pipe, "upcast_vae"):
        yield
        return
    cast = partial(nn.Module.to, vae)
    with shadowed(vae, {"to": cast}), shadowed(pipe, {"upcast_vae": partial(cast, dtype=torch.float32)}):
        try:
            yield
        finally:
            cast(dtype=torch.float16)
