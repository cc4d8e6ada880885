"""A UNet whose transformer blocks are held in 8 or 4 bits by bitsandbytes: frozen, and far smaller.

LLM.int8(), arXiv:2208.07339, and the NF4 type with doubly quantised constants of QLoRA, arXiv:2305.14314,
Sec. 3. What is small or read by every layer stays as it is: convolutions, embeddings of time and size, norms.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from studio.errors import BaseModelError, UsageError
from studio.specs.execution import Quantization

OUTLIER_THRESHOLD = 6.0
"""Inputs beyond this are multiplied in 16 bits beside the 8-bit product. arXiv:2208.07339, Sec. 3.2."""
NUM_SAMPLES = 64
KEPT_SAMPLES = "_samples_before_quantization"


def check_quantization(kind: str, device: torch.device) -> None:
    """Check that weights can be quantised here.

    Raises:
        UsageError: If the kind is unknown, or bitsandbytes is not installed or cannot work on the device.
    """
    if kind == "none":
        return
    if kind not in ("int8", "nf4"):
        raise UsageError(f"quantize_base: unknown '{kind}'. Choose none, int8 or nf4.")
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"quantize_base: '{kind}' needs bitsandbytes, which is not installed. Run "
            "pip install 'diffusion-studio[gpu]', or set quantize_base to none."
        )
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        raise UsageError(
            f"quantize_base: the installed bitsandbytes cannot work on '{device.type}'. Use a GPU, update it "
            "(pip install -U bitsandbytes), or set quantize_base to none."
        )


def quantize(unet: Any, kind: Quantization, *, device: torch.device) -> None:
    """Put quantised layers in the places of the linear layers of a UNet's transformer blocks, on a device.

    Layer by layer, so a GPU never holds more than one of them in full. What the base is known by, a few
    values of each weight, is taken before and stays with the UNet.

    Raises:
        BaseModelError: If the UNet has no such layers.
    """
    # It would say at every call of an 8-bit layer that inputs are rounded to fp16, as the method does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    chosen = quantizable(unet)
    if not chosen:
        raise BaseModelError(
            "the base has no transformer blocks, so there is nothing to quantise. Set quantize_base to none."
        )
    samples: dict[str, Tensor] = {}
    for name, layer in chosen.items():
        samples[f"{name}.weight"] = sampled(layer.weight)
        quantized = (_four_bit if kind == "nf4" else _eight_bit)(layer, device)
        quantized.bias = layer.bias
        unet.set_submodule(name, quantized.train(layer.training))
    setattr(unet, KEPT_SAMPLES, samples)
    # By these names peft learns which of its layers go around them.
    setattr(unet, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def quantizable(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return by name the layers of a UNet that are quantised."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if type(layer) is nn.Linear and ".attentions." in f".{name}."
    }


def quantization_of(module: nn.Module) -> str:
    """Return what the weights of a network are held in: "none", "int8", "nf4" or another type of 4 bits."""
    for parameter in module.parameters():
        kind = type(parameter).__name__
        if kind in ("Params4bit", "Int8Params"):
            return "int8" if kind == "Int8Params" else str(getattr(parameter, "quant_type", "fp4"))
    return "none"


def weight_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of the weight that a parameter stands for: 4-bit ones are packed into bytes."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def statistics(module: Any) -> Iterator[Tensor]:
    """Go through what a quantised layer holds beside its weight and bias; nothing for other modules."""
    weight = module._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = weight.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    elif kind == "Int8Params":
        yield _row_maxima(module)


def sampled(parameter: Tensor) -> Tensor:
    """Return up to 64 values of a parameter, evenly spread, as fp32 ``[n]``."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // NUM_SAMPLES)][:NUM_SAMPLES].float()


def _row_maxima(layer: Any) -> Tensor:
    # The layer takes them over from its weight at the first call.
    found: Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return found


def _four_bit(layer: nn.Linear, device: torch.device) -> Any:
    import bitsandbytes

    with torch.device("meta"):
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
    packed = bitsandbytes.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, quant_type="nf4", module=made
    )
    made.weight = packed.to(device)
    # On some CPUs it would put the weight into another layout at the first call without gradients.
    made.support_avx512bf16_for_cpu = False
    return made


def _eight_bit(layer: nn.Linear, device: torch.device) -> Any:
    import bitsandbytes

    with torch.device("meta"):
        made = bitsandbytes.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
        )
    weight = bitsandbytes.nn.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(device)
    return made
