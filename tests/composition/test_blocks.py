"""Weights that differ from block to block."""

from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.names import kohya_module, modules_of, reference_names
from studio.adapters.parameters import canonical_names, components_of
from studio.composition.block_names import numbered_blocks, with_attention
from studio.composition.engine import compose
from studio.composition.methods.composite import Composite
from studio.composition.methods.merge import Merge
from studio.composition.methods.switch import Switch
from studio.composition.modifiers.blocks import Blocks, read_blocks
from studio.composition.modifiers.schedule import Schedule
from studio.composition.plan import BaseInfo, Composer, Plan, Step, covers
from studio.composition.planner import Planner, make_modifiers
from studio.errors import CompositionError, SpecError
from studio.specs import parse_spec

# The lists of LoRA Block Weight.
ALL_SD1 = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
SOME_SD1 = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
ALL_SDXL = ["BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))]
SOME_SDXL = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
ATTENTION_SD1 = {
    **{
        f"IN{1 + 3 * level + n:02}": f"down_blocks.{level}.attentions.{n}"
        for level in range(3)
        for n in (0, 1)
    },
    "M00": "mid_block.attentions.0",
    **{
        f"OUT{3 * level + n:02}": f"up_blocks.{level}.attentions.{n}" for level in (1, 2, 3) for n in range(3)
    },
}
LAYERS = {
    "unet.conv_in": (4, 4),
    "unet.time_embedding.linear_1": (4, 4),
    "unet.down_blocks.1.attentions.0.proj_in": (4, 4),
    "unet.down_blocks.1.resnets.0.conv1": (4, 4, 3, 3),
    "unet.mid_block.resnets.1.conv2": (4, 4, 3, 3),
    "unet.up_blocks.1.attentions.2.proj_out": (4, 4),
    "unet.up_blocks.1.upsamplers.0.conv": (4, 4, 3, 3),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (4, 4),
}


def adapter(layers: Any = LAYERS) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    changes = {f"{layer}.weight": LoraChange.sample(LAYERS[layer], generator=generator) for layer in layers}
    return Adapter("fox", "lora", changes)


def blocked(
    given: Any, composer: Composer | None = None, *, one: Adapter | None = None, family: str | None = "sd1"
) -> Plan:
    adapters = {"fox": one or adapter(), "ink": adapter()}
    weights = {"fox": 0.5, "ink": 2.0}
    plan = (composer or Merge()).prepare(adapters, weights)
    options = parse_spec(Blocks.Options, {"weights": {"fox": given}})
    base = BaseInfo(family, reference_names(family)) if family else None
    return Blocks(options).modify(plan, adapters, weights, base)


def by_layer(plan: Plan, fraction: float = 0.0) -> dict[str, float]:
    """Return fox's weight in each layer of the denoiser."""
    branch = plan.at(Step(0, 1, fraction))[0]
    return {
        layer.removeprefix("unet."): branch.weight("fox", f"{layer}.weight")
        for layer in LAYERS
        if layer.startswith("unet.")
    }


@pytest.mark.parametrize(
    ("family", "every", "some"),
    [
        ("sd1", ALL_SD1, SOME_SD1.split()),
        ("sd2", ALL_SD1, SOME_SD1.split()),
        ("sdxl", ALL_SDXL, SOME_SDXL.split()),
    ],
    ids=["sd1", "sd2", "sdxl"],
)
def test_the_blocks_are_those_of_the_web_ui(family: str, every: list[str], some: list[str]) -> None:
    blocks = numbered_blocks(reference_names(family))
    assert ["BASE", *blocks] == every
    assert ["BASE", *with_attention(blocks)] == some


def test_the_blocks_of_sdxl_hold_the_layers_that_files_name_by_them() -> None:
    names = reference_names("sdxl")
    blocks = numbered_blocks(names)
    numbers = {"IN": "input_blocks_", "M": "middle_block_", "OUT": "output_blocks_"}
    placed = 0
    for module in modules_of(names):
        key = kohya_module(module, sdxl=True).removeprefix("lora_unet_")
        inside = [label for label in blocks if any(covers(prefix, module) for prefix in blocks[label])]
        if not key.startswith(tuple(numbers.values())):
            assert inside == []
            continue
        (label,) = inside
        stage, number = label.rstrip("0123456789"), int(label.lstrip("INMOUT"))
        assert key.startswith(numbers[stage] if stage == "M" else f"{numbers[stage]}{number}_"), module
        placed += 1
    assert placed == 1044


def test_the_attention_blocks_of_sd1_are_the_known_ones() -> None:
    blocks = numbered_blocks(reference_names("sd1"))
    found = {
        label: prefix.removeprefix("unet.")
        for label, prefixes in blocks.items()
        for prefix in prefixes
        if ".attentions." in prefix
    }
    assert found == ATTENTION_SD1
    assert blocks["IN00"] == ("unet.conv_in",)
    assert blocks["IN03"] == ("unet.down_blocks.0.downsamplers.0",)
    assert set(blocks["OUT05"]) == {
        "unet.up_blocks.1.attentions.2",
        "unet.up_blocks.1.resnets.2",
        "unet.up_blocks.1.upsamplers.0",
    }
    assert blocks["OUT00"] == ("unet.up_blocks.0.resnets.0",)


def test_named_blocks_and_layers_have_their_weight_and_the_others_the_adapters() -> None:
    plan = blocked(
        {
            "up_blocks.1": 0.5,
            "up_blocks.1.upsamplers": 0.25,
            "unet.mid_block.resnets.1.conv2": 0,
            "conv_in": -1,
        }
    )
    assert by_layer(plan) == {
        "conv_in": -0.5,
        "time_embedding.linear_1": 0.5,
        "down_blocks.1.attentions.0.proj_in": 0.5,
        "down_blocks.1.resnets.0.conv1": 0.5,
        "mid_block.resnets.1.conv2": 0.0,
        "up_blocks.1.attentions.2.proj_out": 0.25,
        "up_blocks.1.upsamplers.0.conv": 0.125,
    }
    branch = plan.at(Step(0, 1, 0.0))[0]
    assert branch.weights["ink"] == 2.0
    assert plan.constant and plan.text_weights == {"fox": 0.5, "ink": 2.0}


def test_a_list_of_all_blocks_reaches_convolutions_and_the_text_encoders() -> None:
    values = {label: float(place) for place, label in enumerate(ALL_SD1, start=1)}
    for given in (list(values.values()), ",".join(map(str, values.values()))):
        plan = blocked(given)
        assert by_layer(plan) == {
            "conv_in": 0.5 * values["IN00"],
            "time_embedding.linear_1": 0.5,
            "down_blocks.1.attentions.0.proj_in": 0.5 * values["IN04"],
            "down_blocks.1.resnets.0.conv1": 0.5 * values["IN04"],
            "mid_block.resnets.1.conv2": 0.5 * values["M00"],
            "up_blocks.1.attentions.2.proj_out": 0.5 * values["OUT05"],
            "up_blocks.1.upsamplers.0.conv": 0.5 * values["OUT05"],
        }
        assert plan.text_weights == {"fox": 0.5 * values["BASE"], "ink": 2.0}


def test_a_list_of_the_blocks_with_attention_leaves_the_others_out() -> None:
    given = {label: 1.0 for label in SOME_SD1.split()}
    found = by_layer(blocked(list({**given, "IN04": 0.2}.values())))
    assert found["conv_in"] == 0.0
    assert found["down_blocks.1.resnets.0.conv1"] == found["down_blocks.1.attentions.0.proj_in"] == 0.1
    assert found["mid_block.resnets.1.conv2"] == 0.5


def test_blocks_are_named_as_the_web_ui_does() -> None:
    plan = blocked("in04:0.5, MID:0, BASE:0.1, up_blocks.1:0@0 1@1")
    assert plan.text_weights["fox"] == pytest.approx(0.05)
    assert not plan.constant
    found = by_layer(plan, 0.5)
    assert found["down_blocks.1.resnets.0.conv1"] == 0.25
    assert found["mid_block.resnets.1.conv2"] == 0.0
    assert found["up_blocks.1.upsamplers.0.conv"] == 0.25


def test_the_table_tells_the_mean_of_the_layers() -> None:
    (fox, _) = blocked({"mid_block": 0}).describe(1)
    assert fox.weights == (pytest.approx(0.5 * 6 / 7),)


def test_blocks_and_a_schedule_multiply() -> None:
    inner = blocked({"mid_block": 0.5})
    both = Schedule(Schedule.Options(weights={"fox": "0@0 1@1"})).modify(inner, {}, {})
    assert by_layer(both, 0.5)["mid_block.resnets.1.conv2"] == 0.125
    assert by_layer(both, 0.5)["conv_in"] == 0.25


@pytest.mark.parametrize(
    "composer", [Switch(Switch.Options(switch_every=1)), Composite()], ids=["switch", "composite"]
)
def test_blocks_work_under_any_method(composer: Composer) -> None:
    plan = blocked({"mid_block": 0.5}, composer)
    assert by_layer(plan)["mid_block.resnets.1.conv2"] == 0.25
    second = [*plan.at(Step(1, 2, 0.5))][-1]
    assert dict(second.weights) == {"ink": 2.0}


def test_texts_of_branches_follow_the_value_of_the_text_encoders() -> None:
    plan = blocked({"BASE": 0.2}, Composite(Composite.Options(text_encoder_policy="own")))
    assert plan.texts["fox"].weights == {"fox": 0.1} and plan.texts["ink"].weights == {"ink": 2.0}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"up_blocks.3": 0},
            r"changes nothing in 'up_blocks.3'. Did you mean 'up_blocks.1'\? It changes conv_in",
        ),
        ({"text_encoder": 0}, "changes nothing in 'text_encoder'.*BASE stands for the text encoders"),
        ({"IN01": 1}, "changes nothing in 'IN01'"),
        ([1.0] * 12, "12 values were given; this base has 17 .BASE, IN01, .* or 26 .BASE, IN00, "),
        ({"BASE": "0@0 1@1"}, "the text encoders run once"),
    ],
    ids=["elsewhere", "encoder", "unchanged", "count", "curve"],
)
def test_refusals_name_the_way_out(given: Any, problem: str) -> None:
    with pytest.raises(CompositionError, match=problem):
        blocked(given)


def test_a_list_without_a_base_and_an_unknown_adapter_are_refused() -> None:
    with pytest.raises(CompositionError, match=r"needs a base to count its blocks. Name the blocks"):
        blocked([1.0] * 17, family=None)
    plan = Merge().prepare({"ink": adapter()}, {"ink": 1.0})
    with pytest.raises(CompositionError, match=r"blocks: unknown adapter 'fox'. Known: ink"):
        Blocks(Blocks.Options(weights={"fox": {"conv_in": 0}})).modify(plan, {"ink": adapter()}, {})


def test_blocks_reach_pinned_and_negative_adapters_and_those_that_a_merge_makes_one_of() -> None:
    spoken = "text_encoder.layer.weight"
    change = LoraChange.sample((4, 4), generator=torch.Generator().manual_seed(0))
    changes = {spoken: change, "unet.conv_in.weight": change}
    adapters = {name: Adapter(name, "lora", changes) for name in ("fox", "ink", "safe", "bad")}
    halved = {name: {"BASE": 0.5} for name in ("fox", "safe", "bad")}
    modifiers = {
        "blocks": {"weights": halved},
        "negative": {"adapters": ["bad"]},
        "pin": {"adapters": ["safe"]},
    }
    merge = Merge(Merge.Options(how="svd"))
    weights = dict.fromkeys(adapters, 1.0)
    plan = Planner(merge, make_modifiers(modifiers), adapters, weights, None).plan()
    merged = plan.formed["svd of fox, ink"].changes
    for name, factor in ((spoken, 1.5), ("unet.conv_in.weight", 2.0)):
        zeros = torch.zeros(4, 4)
        wanted = factor * change.delta(zeros, weight=1.0)
        torch.testing.assert_close(merged[name].delta(zeros, weight=1.0), wanted)  # fp32
    assert plan.text_weights == {"svd of fox, ink": 1.0, "safe": 0.5}
    assert plan.texts["negative"].weights == {"svd of fox, ink": 1.0, "bad": 0.5, "safe": 0.5}
    (_, unconditional) = plan.at(Step(0, 1, 0.0))
    assert [unconditional.weight(name, "unet.conv_in.weight") for name in ("bad", "safe")] == [1.0, 1.0]
    curved = make_modifiers({"blocks": {"weights": {"fox": {"unet": "0@0 1@1"}}}})
    with pytest.raises(CompositionError, match=r"'svd' merges the adapters once.*how to linear"):
        Planner(merge, curved, adapters, weights, None).plan()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("1,x,0", "'x' is no number"),
        (3, "a list of values or a table"),
        ({"mid_block": [[0, 1], [2, 0]]}, "between 0 and 1"),
        (["0@0 1@1", 1], "values of a list are numbers"),
    ],
    ids=str,
)
def test_what_are_no_block_weights_is_refused(given: Any, problem: str) -> None:
    with pytest.raises(SpecError, match=f"weights.fox: .*{problem}"):
        blocked(given)


def test_block_weights_survive_json() -> None:
    given = {"fox": "1,0,0.5", "ink": {"mid_block": "0@0 1@1", "IN04": 2}}
    options = parse_spec(Blocks.Options, {"weights": given})
    assert Blocks.Options.model_validate_json(options.model_dump_json()) == options
    assert read_blocks("1,0,0.5") == (1.0, 0.0, 0.5)


def test_in_a_run_each_layer_has_its_own_weight(
    short_sd: Any, make_adapter: Any, summed: Any, target: Any, parameter: Any
) -> None:
    pipe = short_sd()
    weights = {target["linear"]: 0.0, target["conv"]: 0.0, "unet.conv_in.weight": 2.0, target["text"]: 0.5}
    one = make_adapter(pipe, 1, targets=[name for name in weights if name != target["text"]], text=True)
    wanted = {name: summed(pipe, [(one, weight)], name) for name, weight in weights.items()}
    before = {name: parameter(pipe, name).clone() for name in weights}
    blocks = numbered_blocks(canonical_names(components_of(pipe)))
    values = [0.5, *(0.0 if label == "M00" else 2.0 for label in blocks)]
    with compose(pipe, {"fox": one}, modifiers={"blocks": {"weights": {"fox": values}}}):
        for name, weight in weights.items():
            value = parameter(pipe, name)
            torch.testing.assert_close(
                value, wanted[name].float(), rtol=1e-6, atol=1e-6
            )  # one rounding to fp32
            assert torch.equal(value, before[name]) is (weight == 0)
    assert all(torch.equal(parameter(pipe, name), value) for name, value in before.items())
