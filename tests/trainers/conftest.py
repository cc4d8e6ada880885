import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from studio.specs import TrainSpec

# Where the tests of SaRA find what they are compared with.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_sd(short_sd: Callable[[], Any]) -> Callable[[], Any]:
    """Return the factory of short pipelines: what a run takes goes with the number of layers."""
    return short_sd


@pytest.fixture(scope="session")
def tiny_sdxl(short_sdxl: Callable[[], Any]) -> Callable[[], Any]:
    """Return the factory of short SDXL pipelines."""
    return short_sdxl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of four pictures of two colours, one with a caption of its own."""
    data = tmp_path / "data"
    data.mkdir()
    for index, color in enumerate(("red", "blue", "red", "blue")):
        Image.new("RGB", (72, 64), color).save(data / f"{index}.png")
    (data / "1.txt").write_text("a blue wall")
    return data


@pytest.fixture
def spec(folder: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    """Return a function from changed fields to a short run on the folder."""

    def build(**values: Any) -> TrainSpec:
        given = {
            "data": folder,
            "output": tmp_path / "out" / "dog.safetensors",
            "prompt": "sks dog",
            "steps": 2,
            "batch_size": 2,
            "rank": 2,
            "warmup_steps": 0,
            "device": "cpu",
        }
        return TrainSpec.model_validate(given | values)

    return build


def _full_size_unet(family: str) -> nn.Module:
    """Return a UNet with real layer names and shapes and no weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        if family == "sd1":
            return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.fixture(scope="session")
def full_size_unet() -> Callable[[str], nn.Module]:
    """Return a function from a family ("sd1", "sdxl") to its UNet on the meta device."""
    return _full_size_unet
