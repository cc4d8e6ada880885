"""Names of layers, on the full-size models and on tiny ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.adapters.families import family_of, naming_family
from studio.adapters.names import kohya_module, kohya_table, layout_of, modules_of, reference_names, sgm_name
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.errors import AdapterError


def _layers(family: str) -> list[str]:
    """Return linear layers and convolutions, which have weights of two or four axes."""
    names = reference_names(family)
    return [
        name.removesuffix(".weight")
        for name, shape in names.items()
        if name.endswith(".weight") and len(shape) > 1
    ]


def test_sdxl_unet_has_794_layers_that_map_one_to_one_and_back() -> None:
    layers = [layer for layer in _layers("sdxl") if layer.startswith("unet.")]
    keys = [kohya_module(layer, sdxl=True) for layer in layers]
    assert len(layers) == len(set(keys)) == 794
    assert not any("down_blocks" in key or "up_blocks" in key or "mid_block" in key for key in keys)
    table = kohya_table(reference_names("sdxl"))
    assert [table[key] for key in keys] == layers
    assert [table[kohya_module(layer, sdxl=False)] for layer in layers] == layers


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_of_every_family_is_found_again_under_its_key(family: str) -> None:
    names = reference_names(family)
    table = kohya_table(names)
    for module in modules_of(names):
        assert table[kohya_module(module, sdxl=family == "sdxl")] == module
    assert family_of(names) == family


# Names as they stand in files of other tools.
@pytest.mark.parametrize(
    ("module", "sdxl", "key"),
    [
        (
            "unet.up_blocks.0.attentions.0.transformer_blocks.9.attn1.to_out.0",
            True,
            "lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_out_0",
        ),
        ("unet.up_blocks.0.attentions.1.proj_in", True, "lora_unet_output_blocks_1_1_proj_in"),
        ("unet.down_blocks.1.resnets.0.conv_shortcut", True, "lora_unet_input_blocks_4_0_skip_connection"),
        ("unet.down_blocks.0.downsamplers.0.conv", True, "lora_unet_input_blocks_3_0_op"),
        ("unet.up_blocks.1.upsamplers.0.conv", True, "lora_unet_output_blocks_5_2_conv"),
        ("unet.mid_block.resnets.1.time_emb_proj", True, "lora_unet_middle_block_2_emb_layers_1"),
        ("unet.mid_block.attentions.0.proj_out", True, "lora_unet_middle_block_1_proj_out"),
        ("unet.add_embedding.linear_1", True, "lora_unet_label_emb_0_0"),
        ("unet.mid_block.attentions.0.proj_out", False, "lora_unet_mid_block_attentions_0_proj_out"),
        (
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            True,
            "lora_te1_text_model_encoder_layers_3_mlp_fc1",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj",
            True,
            "lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            False,
            "lora_te_text_model_encoder_layers_3_mlp_fc1",
        ),
    ],
)
def test_keys_are_those_of_other_tools(module: str, sdxl: bool, key: str) -> None:
    assert kohya_module(module, sdxl=sdxl) == key


def test_upsampler_of_sd1s_first_up_block_sits_second_for_want_of_attention() -> None:
    layout = layout_of(reference_names("sd1"))
    assert sgm_name("up_blocks.0.upsamplers.0.conv", layout) == "output_blocks.2.1.conv"
    assert sgm_name("up_blocks.1.upsamplers.0.conv", layout) == "output_blocks.5.2.conv"
    assert sgm_name("up_blocks.0.upsamplers.0.conv") == "output_blocks.2.2.conv"
    assert sgm_name("class_embedding.linear_1") is None


def test_kohya_has_no_place_for_a_second_text_encoder_beside_sd1() -> None:
    with pytest.raises(ValueError, match=r"no place for 'text_encoder_2.a'"):
        kohya_module("text_encoder_2.a", sdxl=False)


@pytest.mark.parametrize(
    ("version", "family"),
    [("sdxl_base_v1-0", "sdxl"), ("sd_v1", "sd1"), ("sd_v2_768_v", "sd2"), ("other", "sd2")],
)
def test_metadata_decides_the_family_before_shapes_do(version: str, family: str) -> None:
    shapes = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 1024)}
    assert naming_family(shapes, {"ss_base_model_version": version}) == family


@pytest.mark.parametrize(
    ("key", "shape", "family"),
    [
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
            (4, 768),
            "sd1",
        ),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight", (4, 1024), "sd2"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            (4, 768),
            "sd1",
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, 1024), "sd2"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight", (4, 768), "sd1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 32), "sdxl"),
        ("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.lora_down.weight", (4, 32), "sdxl"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight", (320, 768), None),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 32), None),
    ],
)
def test_keys_and_shapes_tell_the_family(key: str, shape: tuple[int, ...], family: str | None) -> None:
    assert family_of({key: shape}) == family


def test_canonical_names_say_text_model_whether_the_module_has_it_or_not(
    tiny_sdxl: Callable[[], Any],
) -> None:
    components = components_of(tiny_sdxl())
    assert list(components) == ["unet", "text_encoder", "text_encoder_2"]
    names = canonical_names(components)
    tail = "text_model.encoder.layers.1.mlp.fc1.weight"
    assert names[f"text_encoder.{tail}"] == names[f"text_encoder_2.{tail}"] == (64, 32)
    assert "text_encoder_2.text_projection.weight" in names
    for name in names:
        assert tuple(find_parameter(components, name).shape) == names[name]
    for component in ("text_encoder", "text_encoder_2"):
        found = find_parameter(components, f"{component}.{tail}")
        assert find_parameter(components, f"{component}.{tail.removeprefix('text_model.')}") is found


def test_names_stay_the_same_under_peft_layers_and_compiled_modules(tiny_sd: Callable[[], Any]) -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    components = components_of(pipe)
    names = canonical_names(components)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    parameter = find_parameter(components, name)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert any("base_layer" in own for own, _ in pipe.unet.named_parameters())
    assert canonical_names(components) == names
    assert find_parameter(components, name) is parameter
    compiled = {**components, "unet": torch.compile(pipe.unet)}
    assert canonical_names(compiled) == names
    assert find_parameter(compiled, name) is parameter


def test_unknown_parameter_names_the_most_similar_one(tiny_sd: Callable[[], Any]) -> None:
    components = components_of(tiny_sd())
    with pytest.raises(
        AdapterError, match=r"no parameter 'unet.conv_inn.weight'. Did you mean 'unet.conv_in.weight'\?"
    ):
        find_parameter(components, "unet.conv_inn.weight")
    with pytest.raises(AdapterError, match=r"has no 'text_encoder_2' .* it has unet, text_encoder"):
        find_parameter(components, "text_encoder_2.a.weight")
    for name in ("unet", "", "unet.conv_in.weight.more", "unet.conv_in"):
        with pytest.raises(AdapterError, match=r"has no"):
            find_parameter(components, name)
