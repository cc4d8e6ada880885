"""The tables of docs/memory.md: what runs on full-size bases hold, counted on the meta device.

python tests/benchmarks/memory_table.py --into docs/memory.md
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from methods_tables import filled, markdown
from torch import nn

from studio.adapters.names import reference_components
from studio.models.quantization import quantizable
from studio.trainers.estimate import estimate
from studio.trainers.offload import encoders_of

GIB = 2**30
FAMILIES = {"sd1": "SD 1.5", "sdxl": "SDXL"}
KINDS = ("none", "int8", "nf4")
RANK = 16


def make_base(family: str) -> Any:
    """Return what ``estimate`` reads of a pipeline in 16 bits, without weights.

    Args:
        family: "sd1" or "sdxl".
    """
    parts = reference_components(family)
    with torch.device("meta"):
        parts["vae"] = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    for part in parts.values():
        nn.Module.to(part, torch.bfloat16).requires_grad_(False)
    return SimpleNamespace(components=parts, unet=parts["unet"])


def pack(layer: nn.Linear, kind: str) -> None:
    """Give a layer a weight of the size that its quantised one has, and a buffer for what is beside it."""
    numbers, beside, dtype = layer.in_features * layer.out_features, 0, torch.bfloat16
    if kind == "int8":
        beside, dtype = 4 * layer.out_features, torch.uint8
    elif kind == "nf4":
        # Half a byte for each number; a byte for each block of 64 of them, fp32 for each 256 blocks and for
        # their mean; tables of 16 and 256 fp32 numbers. arXiv:2305.14314, Sec. 3.
        blocks = -(-numbers // 64)
        beside, dtype = blocks + 4 * -(-blocks // 256) + 4 + 4 * 16 + 4 * 256, torch.uint8
        numbers = -(-numbers // 2)
    layer.weight = nn.Parameter(torch.empty(numbers, dtype=dtype, device="meta"), requires_grad=False)
    layer.register_buffer("beside", torch.empty(beside, dtype=torch.uint8, device="meta"))


def adapter(unet: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a LoRA on the attention projections of a UNet."""
    return [
        nn.Parameter(torch.empty(shape, device="meta"))
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
        for shape in ((RANK, layer.in_features), (layer.out_features, RANK))
    ]


def rows(family: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of a family for training and for drawing: setting, then GiB by form of the UNet."""
    base, name = make_base(family), FAMILIES[family]
    training = [[f"{name}, encoders on the GPU"], [f"{name}, encoders on the CPU"]]
    drawing = [[f"{name}, the whole base"], [f"{name}, offload = model: the largest network"]]
    layers, trained = quantizable(base.unet).values(), adapter(base.unet)
    for kind in KINDS:
        for layer in layers:
            pack(layer, kind)
        alone = [estimate(SimpleNamespace(components={"one": part}), []) for part in base.components.values()]
        drawing[0].append(in_words(estimate(base, []).total))
        drawing[1].append(in_words(max(part.total for part in alone)))
        # Training holds the autoencoder in fp32.
        nn.Module.to(base.components["vae"], torch.float32)
        training[0].append(in_words(estimate(base, trained).total))
        training[1].append(in_words(estimate(base, trained, away=list(encoders_of(base))).total))
        nn.Module.to(base.components["vae"], torch.bfloat16)
    return training, drawing


def in_words(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / GIB:.2f}"


def tables() -> str:
    """Return both tables."""
    head = ("GiB before activations, 16 bits", "not quantised", "int8", "nf4")
    training, drawing = zip(*(rows(family) for family in FAMILIES), strict=True)
    parts = [
        f"Training a LoRA of rank {RANK} on the attention layers with AdamW:",
        markdown(head, [row for found in training for row in found]),
        "Drawing:",
        markdown(head, [row for found in drawing for row in found]),
    ]
    return "\n\n".join(parts)


def insert(text: str) -> str:
    """Return a document with the tables between its marks."""
    return filled(text, {"memory": tables()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, help="Document whose tables are replaced.")
    path = parser.parse_args().into
    if path is None:
        print(tables())
    else:
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
