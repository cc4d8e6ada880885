"""What cannot be composed is refused before anything happens, and composers of one's own are not."""

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.composition.engine import compose
from studio.composition.methods.switch import Switch
from studio.composition.plan import Branch, Composer, Plan, Step
from studio.errors import AdapterError, CompositionError, SpecError, UsageError


def test_a_second_composition_on_the_same_denoiser_is_refused(
    short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1)}
    with compose(pipe, adapters):
        inside = draw(pipe)
        with (
            pytest.raises(CompositionError, match="UNet2DConditionModel is in another composition"),
            compose(pipe, adapters),
        ):
            pass
        assert torch.equal(draw(pipe), inside)
    with compose(pipe, adapters) as composition, pytest.raises(CompositionError, match="entered already"):
        composition.__enter__()


def test_pipelines_that_share_a_composed_text_encoder_are_refused(short_sd: Any, make_adapter: Any) -> None:
    first, second = short_sd(), short_sd()
    second.text_encoder = first.text_encoder
    adapters = {"one": make_adapter(first, 1, text=True)}
    with (
        compose(first, adapters),
        pytest.raises(CompositionError, match="CLIPTextModel is in another composition"),
        compose(second, adapters),
    ):
        pass


def test_switch_that_leaves_an_adapter_idle_is_refused_before_the_first_step(
    short_sd: Any, make_adapter: Any, draw: Any, watch: Any
) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    seen, handle = watch(pipe)
    with (
        pytest.raises(
            CompositionError, match=r"lets only 'one' act; 'two' would never have a turn. Lower switch_every"
        ),
        compose(pipe, adapters, method="switch"),
    ):
        draw(pipe, steps=5)
    handle.remove()
    assert not seen


def test_live_peft_layers_are_refused_until_they_are_unloaded(short_sd: Any, make_adapter: Any) -> None:
    from peft import LoraConfig

    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1)}
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(
        CompositionError, match=r"unet has live peft layers. Call pipe.unload_lora_weights\(\)"
    ):
        compose(pipe, adapters)
    pipe.unload_lora_weights()
    with compose(pipe, adapters):
        pass


def test_fused_projections_are_refused_until_they_are_separate(short_sd: Any, make_adapter: Any) -> None:
    pipe = short_sd()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(CompositionError, match=r"Call pipe.unfuse_qkv_projections\(\)"):
        compose(pipe, {"one": make_adapter(pipe, 1)})
    pipe.unfuse_qkv_projections(vae=False)
    with compose(pipe, {"one": make_adapter(pipe, 1)}):
        pass


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_on_meta_are_refused_where_nothing_can_act_beside_them(
    part: str, short_sd: Any, target: Any, parameter: Any
) -> None:
    pipe = short_sd()
    name = target["conv" if part == "unet" else "text"]
    dense = FullChange(torch.zeros(parameter(pipe, name).shape))
    getattr(pipe, part).to("meta")
    with pytest.raises(CompositionError, match="enable_model_cpu_offload"):
        compose(pipe, {"one": Adapter(name="one", kind="full", changes={name: dense})})


def test_an_adapter_of_another_architecture_is_refused_with_its_misfits(
    short_sd: Any, short_sdxl: Any, make_adapter: Any, target: Any
) -> None:
    names = ("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight", "unet.conv_in.weight")
    adapter = make_adapter(short_sdxl(), 1, targets=names)
    with pytest.raises(
        AdapterError, match=r"'xl' does not fit the base model \(1 of 2 changes\): the base has no 'unet.up"
    ):
        compose(short_sd(), {"xl": adapter})
    wrong = {target["linear"]: make_adapter(short_sd(), 1).changes["unet.mid_block.resnets.0.conv1.weight"]}
    with pytest.raises(AdapterError, match="is 32 x 128 in the base and 32 x 32 x 3 x 3 in the adapter"):
        compose(short_sd(), {"bad": replace(adapter, changes=wrong)})


def test_a_linear_change_fits_a_one_by_one_convolution(
    short_sd: Any, make_adapter: Any, parameter: Any
) -> None:
    pipe = short_sd()
    name = "unet.mid_block.attentions.0.proj_in.weight"
    adapter = make_adapter(pipe, 1, targets=[name])
    flat = replace(adapter, changes={name: adapter.changes[name].fitted((32, 32))})
    with compose(pipe, {"one": adapter}):
        wanted = parameter(pipe, name).clone()
    with compose(pipe, {"flat": flat}):
        assert torch.equal(parameter(pipe, name), wanted)


def test_wrong_names_and_weights_are_refused(short_sd: Any, make_adapter: Any) -> None:
    pipe = short_sd()
    adapters = {"dog": make_adapter(pipe, 1)}
    with pytest.raises(UsageError, match=r"unknown adapter 'dig'. Did you mean 'dog'"):
        compose(pipe, adapters, weights={"dig": 1.0})
    for wrong in (float("nan"), float("-inf"), "much", None):
        with pytest.raises(UsageError, match=rf"'dog' must be a finite number, got {wrong!r}\."):
            compose(pipe, adapters, weights={"dog": wrong})
    with pytest.raises(SpecError, match=r"shares.dog: Input should be a finite number, got inf"):
        compose(pipe, adapters, method="composite", options={"shares": {"dog": float("inf")}})
    with pytest.raises(UsageError, match=r"'dog' is a str. Read files with studio.load_adapter"):
        compose(pipe, {"dog": "dog.safetensors"})
    with pytest.raises(UsageError, match=r"a table from names to adapters is wanted.*got list"):
        compose(pipe, [*adapters.values()])
    with pytest.raises(UsageError, match=r"unknown composition method 'swich'. Did you mean 'switch'"):
        compose(pipe, adapters, method="swich")
    with pytest.raises(UsageError, match="switch_evry: unknown option"):
        compose(pipe, adapters, method="switch", options={"switch_evry": 1})
    with pytest.raises(CompositionError, match="options were given beside a composer"):
        compose(pipe, adapters, method=Switch(), options={"switch_every": 1})


def test_one_adapter_under_two_names_is_refused_and_a_copy_is_said(
    short_sd: Any, make_adapter: Any, parameter: Any, summed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = short_sd()
    adapter = make_adapter(pipe, 1)
    with pytest.raises(UsageError, match=r"'one' and 'again' are the same adapter. Leave one out"):
        compose(pipe, {"one": adapter, "other": make_adapter(pipe, 2), "again": adapter})
    assert not caplog.records
    wanted = summed(pipe, [(adapter, 0.5), (adapter, 0.25)])
    copied = {"one": adapter, "again": make_adapter(pipe, 1)}
    with compose(pipe, copied, weights={"one": 0.5, "again": 0.25}):
        torch.testing.assert_close(parameter(pipe).double(), wanted, rtol=1e-6, atol=1e-6)  # one rounding
    assert "'one' and 'again' make the same changes" in caplog.text


def test_a_denoiser_call_outside_of_a_run_is_refused_when_the_plan_needs_the_step(
    short_sd: Any, make_adapter: Any
) -> None:
    pipe = short_sd()
    inputs = {
        "sample": torch.zeros(1, 4, 8, 8),
        "timestep": 5,
        "encoder_hidden_states": torch.zeros(1, 77, 32),
    }
    with compose(pipe, {"one": make_adapter(pipe, 1)}):
        pipe.unet(**inputs)
    with (
        compose(pipe, {"one": make_adapter(pipe, 1)}, method="switch"),
        pytest.raises(CompositionError, match="outside of a run"),
    ):
        pipe.unet(**inputs)


def test_a_replaced_scheduler_is_said(short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    with (
        compose(pipe, {"one": make_adapter(pipe, 1)}, method="switch"),
        pytest.raises(CompositionError, match="do not replace the scheduler"),
    ):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        draw(pipe)


def test_a_replaced_denoiser_is_said(short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    with (
        compose(pipe, {"one": make_adapter(pipe, 1)}),
        pytest.raises(CompositionError, match=r"UNet was replaced.*Do that before compose"),
    ):
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        draw(pipe)


@dataclass(frozen=True)
class FixedPlan(Plan):
    """The same given branches at every step."""

    branches: tuple[Branch, ...]

    def at(self, step: Step) -> tuple[Branch, ...]:
        return self.branches


class Fixed(Composer):
    """A composer whose plan is given."""

    def __init__(self, *branches: Branch) -> None:
        super().__init__()
        self.branches = branches

    def prepare(self, adapters: Any, weights: Any, base: Any = None, request: Any = None) -> Plan:
        assert base.architecture == "sd1" and base.shapes["unet.conv_in.weight"] == (32, 4, 3, 3)
        return FixedPlan(tuple(adapters), branches=self.branches, text_weights={})


def test_a_composer_of_ones_own_may_weight_layers(
    short_sd: Any, make_adapter: Any, draw: Any, target: Any, parameter: Any, summed: Any
) -> None:
    pipe = short_sd()
    adapter = make_adapter(pipe, 1)
    conv = "unet.mid_block.resnets.0.conv1.weight"
    base, wanted = parameter(pipe, conv).clone(), summed(pipe, [(adapter, 0.5)])
    with compose(pipe, {"one": adapter}, method=Fixed(Branch({"one": {"unet.mid_block.attentions": 0.5}}))):
        draw(pipe, steps=1)
        assert torch.allclose(parameter(pipe, target["linear"]).double(), wanted, atol=1e-5)
        assert torch.equal(parameter(pipe, conv), base)
    with (
        compose(pipe, {"one": adapter}, method=Fixed(Branch({"one": {"unet.mid": 1.0}}))),
        pytest.raises(CompositionError, match=r"layers that it does not change: unet.mid"),
    ):
        draw(pipe, steps=1)
