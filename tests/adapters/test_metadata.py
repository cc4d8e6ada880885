"""What a file says about the family of its base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import save_adapter
from studio.adapters.header import read_header
from studio.adapters.kinds.lora import LoraChange
from studio.trainers.metadata import base_facts


@pytest.mark.parametrize(
    ("prediction", "width", "wanted"),
    [
        ("epsilon", 768, ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon")),
        ("epsilon", 1024, ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon")),
        ("v_prediction", 1024, ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v")),
        ("v_prediction", 768, ("sd_v1", "False", "stable-diffusion-v1/lora", "v")),
    ],
    ids=["sd1", "sd2", "sd2-v", "sd1-v"],
)
def test_a_file_names_the_family_and_the_prediction_of_its_base(
    prediction: str, width: int, wanted: tuple[str, ...], short_sd: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = short_sd()
    pipe.scheduler = type(pipe.scheduler)(prediction_type=prediction)
    pipe.unet.register_to_config(cross_attention_dim=width)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    changes = {name: LoraChange.sample((32, width), generator=torch.Generator().manual_seed(0))}
    adapter = Adapter("dog", "lora", changes, metadata=base_facts(pipe))
    said = read_header(save_adapter(adapter, tmp_path / "dog.safetensors")).metadata
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(said[key] for key in keys) == wanted
