"""Names of layers: canonical (diffusers), kohya's with underscores, and SGM's for SDXL.

Kohya's names join the path of a module by underscores, which cannot be undone by replacing characters
("to_out_0", "proj_in"), so they are read by tables that are built from the list of a model's parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class Layout:
    """What SGM's numbering of a UNet depends on.

    Attributes:
        layers_per_block: Residual layers per down block.
        attention_up_blocks: Up blocks with attention; their upsampler is the third part of its SGM block, not
            the second.
    """

    layers_per_block: int = 2
    attention_up_blocks: frozenset[int] = frozenset({0, 1})


SDXL_LAYOUT = Layout()


def layout_of(names: Collection[str]) -> Layout:
    """Return the layout of the UNet with those canonical parameter names."""
    paths = [name.split(".")[1:] for name in names if name.startswith("unet.")]
    layers = {path[3] for path in paths if path[:3] == ["down_blocks", "0", "resnets"]}
    attention = {int(path[1]) for path in paths if path[0] == "up_blocks" and path[2] == "attentions"}
    return Layout(len(layers) or 2, frozenset(attention))


def sgm_name(path: str, layout: Layout = SDXL_LAYOUT) -> str | None:
    """Return SGM's name of a UNet module, or None if it has none.

    Args:
        path: The module in diffusers' spelling, without "unet.": "up_blocks.0.attentions.1.proj_in".
        layout: Of the UNet; SDXL's by default.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    stage, *rest = path.split(".")
    if stage == "mid_block" and len(rest) > 2:
        group, index, *inner = rest
        block = f"middle_block.{2 * int(index) + (group == 'attentions')}"
        return _inside(block, group, inner)
    if stage not in ("down_blocks", "up_blocks") or len(rest) < 4:
        return None
    level, group, index, *inner = rest
    stride = layout.layers_per_block + 1
    if group == "downsamplers":
        return f"input_blocks.{stride * (int(level) + 1)}.0.op"
    if group == "upsamplers":
        part = 2 if int(level) in layout.attention_up_blocks else 1
        return f"output_blocks.{stride * int(level) + layout.layers_per_block}.{part}.conv"
    slot = stride * int(level) + int(index)
    block = f"input_blocks.{slot + 1}" if stage == "down_blocks" else f"output_blocks.{slot}"
    return _inside(f"{block}.{int(group == 'attentions')}", group, inner)


def _inside(block: str, group: str, inner: list[str]) -> str | None:
    if group == "attentions":
        return ".".join([block, *inner])
    if group == "resnets" and inner[0] in _RESNET:
        return ".".join([block, _RESNET[inner[0]], *inner[1:]])
    return None


def modules_of(names: Collection[str]) -> list[str]:
    """Return the canonical names of the modules that own the named parameters, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def kohya_module(module: str, *, sdxl: bool, layout: Layout = SDXL_LAYOUT) -> str:
    """Return kohya's key of a canonical module: diffusers' names for SD 1 and 2, SGM's for SDXL.

    These two are what every other tool reads.

    Args:
        module: Its canonical name.
        sdxl: Whether the base is of SDXL's family.
        layout: Of its UNet, which SGM's numbers depend on.

    Raises:
        ValueError: If kohya's naming has no place for the component.
    """
    component, _, path = module.partition(".")
    if component == "unet":
        return _underscored("lora_unet_", (sgm_name(path, layout) if sdxl else None) or path)
    prefixes = (
        {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"} if sdxl else {"text_encoder": "lora_te_"}
    )
    if component not in prefixes:
        raise ValueError(f"kohya's names have no place for '{module}'")
    return _underscored(prefixes[component], path)


def kohya_table(names: Collection[str]) -> dict[str, str]:
    """Return the canonical module by kohya's key, in every spelling in use, for a model's parameters."""
    layout = layout_of(names)
    table: dict[str, str] = {}
    for module in modules_of(names):
        component, _, path = module.partition(".")
        if component == "unet":
            sgm = sgm_name(path, layout)
            keys = [_underscored("lora_unet_", spelling) for spelling in (path, sgm) if spelling]
        elif component == "text_encoder":
            keys = [_underscored(prefix, path) for prefix in ("lora_te_", "lora_te1_")]
        else:
            keys = [_underscored("lora_te2_", path)]
        table.update(dict.fromkeys(keys, module))
    return table


def _underscored(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


_UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_ENCODERS = {"sd1": (_CLIP_L,), "sd2": (_CLIP_H,), "sdxl": (_CLIP_L, _CLIP_G)}


def reference_components(family: str) -> dict[str, nn.Module]:
    """Return UNet and text encoders of the full-size model of a family on the meta device, without weights.

    Args:
        family: "sd1", "sd2" (2.1) or "sdxl".
    """
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        components: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**_UNETS[family])}
        for index, config in enumerate(_ENCODERS[family]):
            kind = CLIPTextModelWithProjection if index else CLIPTextModel
            components["text_encoder_2" if index else "text_encoder"] = kind(CLIPTextConfig(**config))
    return components


@lru_cache(maxsize=3)
def reference_names(family: str) -> Mapping[str, tuple[int, ...]]:
    """Return canonical parameter names and shapes of the full-size model of a family.

    Args:
        family: "sd1", "sd2" (2.1) or "sdxl".
    """
    from studio.adapters.parameters import canonical_names

    return canonical_names(reference_components(family))
