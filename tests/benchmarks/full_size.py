"""SD 1.5 and SDXL at their full size without anybody's weights, and what files call their parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import nn

import studio
from studio.adapters.names import reference_components

Shapes = dict[str, tuple[int, ...]]


def make_pipe(family: str, *, whole_encoders: bool = True) -> Any:
    """Return a pipeline in bf16 with real layers and random weights.

    Args:
        family: "sd1" or "sdxl".
        whole_encoders: Whether the text encoders have all their layers, or only two of them.
    """
    starter = studio.load_base("starter", device="cpu", precision="fp32")
    parts: dict[str, Any] = dict(reference_components(family))
    for name in ("text_encoder", "text_encoder_2"):
        if name in parts and not whole_encoders:
            del getattr(parts[name], "text_model", parts[name]).encoder.layers[2:]
    with torch.device("meta"):
        parts["vae"] = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        # The libraries' own `to` warns of parts that must stay fp32, also where there are none.
        _fill(nn.Module.to(part, torch.bfloat16).to_empty(device="cpu"), generator)
    parts["tokenizer"], parts["scheduler"] = starter.tokenizer, starter.scheduler
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer_2=starter.tokenizer, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Give a network weights of a trained one's size, and its buffers what they hold: positions."""
    module.requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))


def sgm_shapes() -> Shapes:
    """Return names and shapes of the parameters of SDXL's UNet as its authors' program has them.

    Written down from how that program lays its blocks out, not from diffusers' names.
    """
    shapes: Shapes = {}

    def add(module: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{module}.weight"] = weight
        if bias:
            shapes[f"{module}.bias"] = weight[:1]

    def residual(block: str, before: int, after: int) -> None:
        add(f"{block}.in_layers.0", before)
        add(f"{block}.in_layers.2", after, before, 3, 3)
        add(f"{block}.emb_layers.1", after, 1280)
        add(f"{block}.out_layers.0", after)
        add(f"{block}.out_layers.3", after, after, 3, 3)
        if before != after:
            add(f"{block}.skip_connection", after, before, 1, 1)

    def transformer(block: str, width: int, depth: int) -> None:
        if not depth:
            return
        add(f"{block}.norm", width)
        add(f"{block}.proj_in", width, width)
        add(f"{block}.proj_out", width, width)
        for layer in (f"{block}.transformer_blocks.{number}" for number in range(depth)):
            for attention, read in (("attn1", width), ("attn2", 2048)):
                add(f"{layer}.{attention}.to_q", width, width, bias=False)
                add(f"{layer}.{attention}.to_k", width, read, bias=False)
                add(f"{layer}.{attention}.to_v", width, read, bias=False)
                add(f"{layer}.{attention}.to_out.0", width, width)
            add(f"{layer}.ff.net.0.proj", 8 * width, width)
            add(f"{layer}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                add(f"{layer}.{norm}", width)

    add("time_embed.0", 1280, 320)
    add("time_embed.2", 1280, 1280)
    add("label_emb.0.0", 1280, 2816)
    add("label_emb.0.2", 1280, 1280)
    add("input_blocks.0.0", 320, 4, 3, 3)
    levels = ((320, 0), (640, 2), (1280, 10))
    width, number, skips = 320, 0, [320]
    for width_of, depth in levels:
        for _ in range(2):
            number += 1
            residual(f"input_blocks.{number}.0", width, width_of)
            transformer(f"input_blocks.{number}.1", width_of, depth)
            width = width_of
            skips.append(width)
        if width_of != 1280:
            number += 1
            add(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
    residual("middle_block.0", 1280, 1280)
    transformer("middle_block.1", 1280, 10)
    residual("middle_block.2", 1280, 1280)
    number = 0
    for width_of, depth in reversed(levels):
        for place in range(3):
            residual(f"output_blocks.{number}.0", width + skips.pop(), width_of)
            transformer(f"output_blocks.{number}.1", width_of, depth)
            width = width_of
            if place == 2 and width_of != 320:
                add(f"output_blocks.{number}.{2 if depth else 1}.conv", width, width, 3, 3)
            number += 1
    add("out.0", 320)
    add("out.2", 4, 320, 3, 3)
    return shapes


def kohya_shapes(components: Mapping[str, nn.Module]) -> Shapes:
    """Return the shapes of a model's parameters, each under kohya's key of its module and its own name.

    formats.md: SD 1.5 by diffusers' names, SDXL by its authors'; text encoders with ``text_model`` always.
    """
    sdxl = "text_encoder_2" in components
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_"}
    prefixes["text_encoder_2"] = "lora_te2_"
    shapes: Shapes = {}
    for component, module in components.items():
        if component == "unet" and sdxl:
            named: Iterator[tuple[str, tuple[int, ...]]] = iter(sgm_shapes().items())
        else:
            named = ((name, tuple(value.shape)) for name, value in module.named_parameters())
        for name, shape in named:
            layer, _, own = name.rpartition(".")
            if component != "unet" and not layer.startswith(("text_model.", "text_projection")):
                layer = f"text_model.{layer}"
            shapes[f"{prefixes[component]}{layer.replace('.', '_')}.{own}"] = shape
    return shapes


def lora_file(shapes: Shapes, *, rank: int, form: str) -> Shapes:
    """Return the tensors of a LoRA file on the attention projections of these parameters.

    Args:
        shapes: Of the model's parameters, as ``kohya_shapes`` or by diffusers' names.
        rank: Of all layers.
        form: "kohya" or "diffusers".
    """
    ends = ("to_q", "to_k", "to_v", "to_out_0", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    found: Shapes = {}
    for name, shape in shapes.items():
        layer, _, own = name.rpartition(".")
        if own != "weight" or not layer.endswith(ends):
            continue
        down, up = (rank, shape[1]), (shape[0], rank)
        if form == "kohya":
            found |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": ()}
        else:
            found |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return found


def dense_file(shapes: Shapes) -> Shapes:
    """Return the tensors of a kohya file that holds a change of every entry of these parameters."""
    found: Shapes = {}
    for name, shape in shapes.items():
        layer, _, own = name.rpartition(".")
        norm = len(shapes[f"{layer}.weight"]) == 1
        part = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}[own][norm]
        found[f"{layer}.{part}"] = shape
    return found
