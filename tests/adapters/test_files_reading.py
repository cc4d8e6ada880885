"""Adapter files of others: read in every spelling, and refused when they do not fit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.kinds.lora import LoraChange
from studio.errors import AdapterError, BaseNeeded

Factory = Callable[[], Any]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KEY = "lora_unet_" + LAYER.replace(".", "_")


def _file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)
    return path


def _pair(key: str = KEY, *, rank: int = 4, width: int = 32, out: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{key}.lora_down.weight": torch.ones(rank, width),
        f"{key}.lora_up.weight": torch.ones(out, rank),
    }


# Keys of one attention layer as diffusers has spelled them over time.
@pytest.mark.parametrize(
    ("down", "up", "module"),
    [
        (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight", f"unet.{LAYER}"),
        (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight", f"unet.{LAYER}"),
        (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight", f"unet.{LAYER}"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.up.weight",
            f"unet.{LAYER}",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        (
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
    ],
    ids=["peft", "lora", "bare-unet", "processor-out", "processor-k", "text-linear-layer", "text-flattened"],
)
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_older_spellings_of_diffusers_are_read(
    tmp_path: Path, tiny_sd: Factory, down: str, up: str, module: str, with_base: bool
) -> None:
    path = _file(tmp_path / "a.safetensors", {down: torch.full((4, 32), 2.0), up: torch.full((32, 4), 3.0)})
    adapter = load_adapter(path, base=tiny_sd() if with_base else None)
    assert list(adapter.changes) == [f"{module}.weight"]
    delta = adapter.changes[f"{module}.weight"].delta(torch.zeros(32, 32), weight=1.0)
    assert torch.equal(delta, torch.full((32, 32), 24.0))


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{LAYER}": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2, "to_q": 16}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"o_k": 2}}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({}, 1.0),
    ],
    ids=["alpha", "whole-name", "name-end", "no-part-of-a-word", "rslora", "other-component", "nothing"],
)
def test_alpha_in_pefts_metadata_counts(
    tmp_path: Path, tiny_sd: Factory, config: dict[str, Any], factor: float
) -> None:
    tensors = {
        f"unet.{LAYER}.lora_A.weight": torch.ones(4, 32),
        f"unet.{LAYER}.lora_B.weight": torch.ones(32, 4),
    }
    path = _file(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    change = load_adapter(path, base=tiny_sd()).changes[f"unet.{LAYER}.weight"]
    assert torch.equal(change.delta(torch.zeros(32, 32), weight=1.0), torch.full((32, 32), 4.0 * factor))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ('{"unet.use_dora": true}', "it is a DoRA"),
        ('{"unet.lora_alpha": "8"}', "the alpha '8', a number was expected"),
        ('{"unet.lora_alpha": Infinity}', "the alpha inf, a number was expected"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern .* is not a JSON object"),
        ('{"unet.alpha_pattern": {"(a+)+b": 1}}', "is not a plain name"),
    ],
)
def test_pefts_metadata_is_checked_like_the_rest(
    tmp_path: Path, tiny_sd: Factory, config: str, words: str
) -> None:
    tensors = {
        f"unet.{LAYER}.lora_A.weight": torch.ones(4, 32),
        f"unet.{LAYER}.lora_B.weight": torch.ones(32, 4),
    }
    path = _file(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": config})
    with pytest.raises(AdapterError, match=words):
        load_adapter(path, base=tiny_sd())


def test_pointwise_convolutions_are_read_from_linear_factors(tmp_path: Path, tiny_sd: Factory) -> None:
    path = _file(tmp_path / "a.safetensors", _pair("lora_unet_mid_block_attentions_0_proj_in"))
    assert load_adapter(path, base=tiny_sd()).changes["unet.mid_block.attentions.0.proj_in.weight"].shape == (
        32,
        32,
        1,
        1,
    )


def test_name_may_be_chosen(tmp_path: Path, tiny_sd: Factory) -> None:
    path = _file(tmp_path / "a.safetensors", _pair())
    assert load_adapter(path, base=tiny_sd()).name == "a"
    assert load_adapter(path, base=tiny_sd(), name="dog").name == "dog"


SDXL_KEY = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            _pair(SDXL_KEY, width=2048),
            "^style.safetensors holds SDXL keys, the base model is a custom model. Choose an SDXL base",
        ),
        (_pair(width=768), "holds SD 1.5 keys, the base model is a custom model. Choose an SD 1.5 base"),
        (_pair(width=1024), "holds SD 2.x keys"),
        (
            _pair(width=40),
            rf"the shapes of {KEY} \(32 x 40, the base has 32 x 32\) differ. Choose the base it was made for",
        ),
        (_pair(KEY + "x"), rf"it has no layer for {KEY}x.lora_down.weight, {KEY}x.lora_up.weight"),
        ({**_pair(), "surprise": torch.ones(1)}, "holds unexpected tensors: surprise"),
        (
            {**_pair(), f"{KEY}.on_input": torch.ones(1)},
            f"kind of change that is not supported: {KEY}.on_input",
        ),
        (
            {f"{KEY}.lora_down.weight": torch.ones(4, 32)},
            "is incomplete: beside .*lora_down.weight it lacks lora_up.weight",
        ),
        ({f"{KEY}.alpha": torch.tensor(1.0)}, "it lacks lora_down.weight, lora_up.weight"),
        (
            {**_pair(), f"{KEY}.lora_up.weight": torch.ones(32, 3)},
            f"is damaged at '{KEY}': .* differ in rank, 4 and 3",
        ),
        (
            {**_pair(), f"{KEY}.lora_up.weight": torch.full((32, 4), float("nan"))},
            f"NaN or infinite values in {KEY}.lora_up",
        ),
        ({**_pair(), f"{KEY}.alpha": torch.tensor(float("inf"))}, f"NaN or infinite values in {KEY}.alpha"),
        (
            {**_pair(), **_pair("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k")},
            "changes 'unet.* under two names",
        ),
        (
            {"model.diffusion_model.out.2.weight": torch.ones(2)},
            "no known adapter format .* model.diffusion_model.out.2",
        ),
        (
            {f"unet.{LAYER}.lora_A.weight": torch.ones(4, 32), f"{LAYER}.lora_A.weight": torch.ones(4, 32)},
            "two spellings",
        ),
    ],
    ids=[
        "sdxl",
        "sd1",
        "sd2",
        "shape",
        "key",
        "stray",
        "ia3",
        "half",
        "alpha-only",
        "rank",
        "nan",
        "inf-alpha",
        "twice",
        "checkpoint",
        "spelled-twice",
    ],
)
def test_file_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, tiny_sd: Factory, tensors: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        load_adapter(_file(tmp_path / "style.safetensors", tensors), base=tiny_sd())
    assert "\n" not in str(caught.value) and "style.safetensors" in str(caught.value)


def test_long_lists_of_unmatched_keys_are_counted(tmp_path: Path, tiny_sd: Factory) -> None:
    tensors = {key: value for index in range(10) for key, value in _pair(f"lora_unet_x{index}").items()}
    with pytest.raises(AdapterError, match=r"lora_unet_x0.lora_down.weight, .* and 12 more. Choose"):
        load_adapter(_file(tmp_path / "a.safetensors", tensors), base=tiny_sd())
    with pytest.raises(
        BaseNeeded, match=r"fits neither SD 1.5, SD 2.1 nor SDXL: .* and 12 more. Give the base"
    ):
        load_adapter(_file(tmp_path / "a.safetensors", tensors))


def test_full_size_file_is_read_without_a_base(tmp_path: Path) -> None:
    change = LoraChange(torch.ones(2, 2048), torch.ones(640, 2), 2.0)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight"
    path = save_adapter(Adapter("a", "lora", {name: change}), tmp_path / "a.safetensors")
    assert next(iter(read_header(path).tensors)).startswith(
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    )
    assert list(load_adapter(path).changes) == [name]
    assert read_header(path).metadata["ss_base_model_version"] == "sdxl_base_v1-0"
