"""Tell families of base models apart by the names and shapes in files and models, without torch."""

import re
from collections.abc import Mapping

from studio.errors import AdapterError

LABELS = {"sd1": "SD 1.5", "sd2": "SD 2.x", "sdxl": "SDXL"}
# ss_base_model_version, modelspec.architecture and modelspec.implementation, by family; "sd2-v" is SD 2.x
# trained on velocity, whose files have the names and shapes of "sd2".
KOHYA_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sd2-v": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
IMPLEMENTATIONS = {
    "sd1": "diffusers",
    "sd2": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}

# Dots in diffusers' names, underscores in kohya's.
_SDXL_ONLY = re.compile(r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding|transformer_blocks[._][1-9]")
_TEXT_WIDTH = re.compile(
    r"attn2[._](processor\.)?to_[kv](_lora)?[._]((.*(lora_down|lora_A|down)\.)?weight|diff)$"
)
_ENCODER_WIDTH = re.compile(
    r"^(lora_te_|text_encoder\.).*(self_attn[._][qkv]_proj|mlp[._]fc1)\.((.*(lora_down|lora_A|down)\.)?weight|diff)$"
)
_FAMILY_BY_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return "sd1", "sd2" or "sdxl" for a file's tensors or a model's parameters; None if nothing tells."""
    if any(_SDXL_ONLY.search(name) for name in shapes):
        return "sdxl"
    for pattern in (_TEXT_WIDTH, _ENCODER_WIDTH):
        widths = {shape[1] for name, shape in shapes.items() if len(shape) > 1 and pattern.search(name)}
        if len(widths) == 1:
            return _FAMILY_BY_WIDTH.get(widths.pop())
    return None


def check_one_family(adapters: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise AdapterError if adapters, given by name as shapes by parameter, are for different families."""
    families = {name: family for name, shapes in adapters.items() if (family := family_of(shapes))}
    if len(set(families.values())) > 1:
        kinds = ", ".join(f"'{name}' for {label(family)}" for name, family in families.items())
        raise AdapterError(f"the adapters are for different base models: {kinds}. Choose adapters for one.")


def naming_family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """Return the family whose names a file should use, by its metadata, else by names and shapes."""
    version = metadata.get("ss_base_model_version", "")
    for family, prefix in (("sdxl", "sdxl"), ("sd2", "sd_v2"), ("sd1", "sd_v1")):
        if version.startswith(prefix):
            return family
    return family_of(shapes)


def label(family: str | None) -> str:
    """Return what a family is called in messages."""
    return LABELS.get(family or "", "a custom model")
