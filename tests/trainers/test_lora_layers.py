import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from studio.adapters.bank import WeightBank
from studio.adapters.parameters import canonical_names, components_of
from studio.errors import SpecError, TrainingError
from studio.specs import TrainSpec, parse_spec
from studio.trainers.lora_layers import LoraLayers, target_layers
from studio.trainers.methods.lora import LoraOptions


def full_size_unet(family: str) -> nn.Module:
    """Return a UNet with real layer names and shapes and no weights."""
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


@pytest.mark.parametrize(
    ("family", "targets", "linears", "convolutions"),
    [
        ("sd1", "attention", 128, 0),
        ("sd1", "attention+ff", 160, 0),
        # 22 residual blocks give a time projection and two convolutions each, 14 of them a shortcut;
        # 6 samplers; 32 projections in and out of the transformers.
        ("sd1", "all", 160 + 22, 44 + 14 + 6 + 32),
        ("sdxl", "attention", 560, 0),
        ("sdxl", "attention+ff", 700, 0),
        ("sdxl", "all", 700 + 22 + 17, 34 + 4 + 11),
    ],
)
def test_targets_of_full_size_models(family: str, targets: Any, linears: int, convolutions: int) -> None:
    pipe: Any = SimpleNamespace(unet=full_size_unet(family))
    layers = target_layers(pipe, LoraOptions(targets=targets, rank=4))["unet"]
    kinds = [type(layer) for layer in layers.values()]
    assert (kinds.count(nn.Linear), len(kinds) - kinds.count(nn.Linear)) == (linears, convolutions)
    outside = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_proj")
    assert not any(name.split(".")[0] in outside for name in layers)


@pytest.mark.parametrize(("targets", "number"), [("attention", 8), ("attention+ff", 12), ("all", 12)])
def test_targets_of_text_encoders(tiny_sdxl: Callable[[], Any], targets: Any, number: int) -> None:
    found = target_layers(tiny_sdxl(), LoraOptions(targets=targets, train_text_encoder=True))
    assert list(found) == ["unet", "text_encoder", "text_encoder_2"]
    assert len(found["text_encoder"]) == len(found["text_encoder_2"]) == number


def test_a_rank_that_is_too_large_names_the_layer_and_its_limit() -> None:
    pipe: Any = SimpleNamespace(unet=full_size_unet("sd1"))
    words = (
        r"rank must be at most 320 for 'unet\.down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1"
        r"\.to_q' \(320 x 320\), got 512\. Lower rank or exclude the layer\. 39 more layers are smaller"
    )
    with pytest.raises(TrainingError, match=words):
        target_layers(pipe, LoraOptions(rank=512))
    smaller = ("down_blocks.0", "up_blocks.3")
    assert len(target_layers(pipe, LoraOptions(rank=512, exclude=smaller))["unet"]) == 88


def test_exclusions_must_match_and_leave_something(tiny_sd: Callable[[], Any]) -> None:
    kept = target_layers(tiny_sd(), LoraOptions(exclude=("attn1", "mid_block")))["unet"]
    assert kept and not any("attn1" in name or "mid_block" in name for name in kept)
    with pytest.raises(
        TrainingError, match=r"exclude matches no layer: 'atn1'\. Layers are called like 'unet\.down_blocks"
    ):
        target_layers(tiny_sd(), LoraOptions(exclude=("attn1", "atn1")))
    with pytest.raises(TrainingError, match="no layer is left to train with targets 'attention'"):
        target_layers(tiny_sd(), LoraOptions(exclude=("unet",)))


def test_rank_zero_is_refused_by_the_specification() -> None:
    with pytest.raises(SpecError, match=r"rank.*greater than or equal to 1, got 0"):
        parse_spec(TrainSpec, {"data": "d", "output": "o.safetensors", "rank": 0})


def test_the_method_is_torch_free_at_import() -> None:
    code = (
        "import sys; from studio.registry import TRAINERS; "
        "assert TRAINERS['lora'].Options(rank=3).rank == 3; "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def forward(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, states = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 32)))
    with torch.no_grad():
        result: torch.Tensor = pipe.unet(latents, torch.tensor([10, 700]), states).sample
    return result


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all"])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_exported_adapter_is_what_the_layers_did(
    tiny_sd: Callable[[], Any], targets: Any, alpha: float | None
) -> None:
    pipe = tiny_sd()
    plain = forward(pipe)
    layers = LoraLayers(
        pipe, LoraOptions(rank=3, alpha=alpha, targets=targets, train_text_encoder=True), seed=0
    )
    assert torch.equal(forward(pipe), plain), "an untrained adapter must not change anything"
    generator = torch.Generator().manual_seed(0)
    for group in layers.groups(TrainSpec.model_validate({"data": "d", "output": "o.safetensors"})):
        for parameter in group.parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    live, adapter = forward(pipe), layers.export()
    with layers.suspended():
        assert torch.equal(forward(pipe), plain)
    assert torch.equal(forward(pipe), live)
    layers.remove()
    components = components_of(pipe)
    known = canonical_names(components)
    assert all(known[name] == change.shape for name, change in adapter.changes.items())
    with WeightBank(components, adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        assert torch.allclose(forward(pipe), live, atol=1e-5)  # two products against one in fp32
    assert torch.equal(forward(pipe), plain) and (live - plain).abs().max() > 1e-2


def test_gradients_reach_the_adapter_only(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    layers = LoraLayers(pipe, LoraOptions(rank=2, targets="all"), seed=0)
    groups = layers.groups(TrainSpec.model_validate({"data": "d", "output": "o.safetensors"}))
    trained = {id(parameter) for group in groups for parameter in group.parameters}
    pipe.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)).sample.square().mean().backward()
    for name, parameter in pipe.unet.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained) == parameter.requires_grad, name


def test_the_start_depends_on_seed_and_layer_alone(tiny_sd: Callable[[], Any]) -> None:
    def downs(seed: int, **options: Any) -> dict[str, torch.Tensor]:
        pipe = tiny_sd()
        torch.manual_seed(seed + 10)
        changes: Any = LoraLayers(pipe, LoraOptions(rank=2, **options), seed=seed).export().changes
        return {name: change.down for name, change in changes.items()}

    first, narrower, other = downs(0), downs(0, exclude=("mid_block",)), downs(1)
    assert len(narrower) < len(first) and all(
        torch.equal(first[name], down) for name, down in narrower.items()
    )
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({tuple(down.flatten()[:4].tolist()) for down in first.values()}) == len(first)


def test_parameters_are_fp32_on_a_16_bit_base(tiny_sd: Callable[[], Any]) -> None:
    layers = LoraLayers(tiny_sd().to(torch.float16), LoraOptions(rank=2, targets="all"), seed=0)
    groups = layers.groups(TrainSpec.model_validate({"data": "d", "output": "o.safetensors"}))
    assert {parameter.dtype for group in groups for parameter in group.parameters} == {torch.float32}


def test_a_pipeline_with_loaded_adapters_is_refused(tiny_sd: Callable[[], Any]) -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(TrainingError, match=r"peft adapters loaded\. Call pipe\.unload_lora_weights"):
        LoraLayers(pipe, LoraOptions(), seed=0)
