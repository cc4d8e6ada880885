"""Which layers are chosen by kind, by block and by name."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from studio.errors import TrainingError
from studio.trainers.targets import by_name, check_ranks, target_layers


def chosen(pipe: Any, targets: Any = "attention", **given: Any) -> dict[str, dict[str, nn.Module]]:
    return target_layers(pipe, **{"targets": targets, "exclude": (), "text_encoders": False} | given)


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
def test_targets_of_full_size_models(
    full_size_unet: Callable[[str], nn.Module], family: str, targets: Any, linears: int, convolutions: int
) -> None:
    layers = chosen(SimpleNamespace(unet=full_size_unet(family)), targets)["unet"]
    kinds = [type(layer) for layer in layers.values()]
    assert (kinds.count(nn.Linear), len(kinds) - kinds.count(nn.Linear)) == (linears, convolutions)
    outside = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_proj")
    assert not any(name.split(".")[0] in outside for name in layers)


@pytest.mark.parametrize(("targets", "number"), [("attention", 8), ("attention+ff", 12), ("all", 12)])
def test_targets_of_text_encoders(tiny_sdxl: Callable[[], Any], targets: Any, number: int) -> None:
    found = chosen(tiny_sdxl(), targets, text_encoders=True)
    assert list(found) == ["unet", "text_encoder", "text_encoder_2"]
    assert len(found["text_encoder"]) == len(found["text_encoder_2"]) == number


def test_a_rank_that_is_too_large_names_the_layer_and_its_limit(
    full_size_unet: Callable[[str], nn.Module],
) -> None:
    layers = chosen(SimpleNamespace(unet=full_size_unet("sd1")))
    ranks = {f"unet.{name}": 512 for name in layers["unet"]}
    words = (
        r"rank must be at most 320 for 'unet\.down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1"
        r"\.to_q' \(320 x 320\), got 512\. Lower rank or exclude the layer\. 39 more layers are smaller"
    )
    with pytest.raises(TrainingError, match=words):
        check_ranks(layers, ranks)
    with pytest.raises(TrainingError, match=r"rank must be at most 160 for .*, got 512"):
        check_ranks(layers, ranks, times=2)
    small = by_name(layers, {"down_blocks.0": 320, "up_blocks.3": 320}, option="block_ranks")
    check_ranks(layers, ranks | small)


def test_exclusions_must_match_and_leave_something(tiny_sd: Callable[[], Any]) -> None:
    kept = chosen(tiny_sd(), exclude=("attn1", "mid_block"))["unet"]
    assert kept and not any("attn1" in name or "mid_block" in name for name in kept)
    words = (
        r"exclude matches no layer: 'atn1'\. Did you mean 'attn1'\? Layers are called like 'unet\.down_blocks"
    )
    with pytest.raises(TrainingError, match=words):
        chosen(tiny_sd(), exclude=("attn1", "atn1"))
    with pytest.raises(TrainingError, match="no layer is left to train with targets 'attention'"):
        chosen(tiny_sd(), exclude=("unet",))


def test_names_match_by_whole_parts_and_the_last_one_counts() -> None:
    names = ["layers.1.q_proj", "layers.11.q_proj", "layers.2.k_proj"]
    layers = {"text_encoder": {name: nn.Linear(1, 1) for name in names}}
    found = by_name(layers, {"layers": 1, "layers.1": 2, "q_proj": 3}, option="block_ranks")
    assert found == {f"text_encoder.{name}": rank for name, rank in zip(names, (3, 3, 1), strict=True)}
    assert by_name(layers, {"layers.1": 2}, option="block_ranks") == {"text_encoder.layers.1.q_proj": 2}
    assert by_name(layers, {"text_encoder.layers.2": 2}, option="x") == {"text_encoder.layers.2.k_proj": 2}
    words = r"block_ranks matches no layer: 'layer\.11', '_proj'\. Did you mean 'layers\.11'\?"
    with pytest.raises(TrainingError, match=words):
        by_name(layers, {"layer.11": 1, "layers": 2, "_proj": 3}, option="block_ranks")
