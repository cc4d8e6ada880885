"""The engine on real pipelines: what acts is what the plan says, and nothing stays behind."""

import contextlib
import logging
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.adapters.parameters import components_of, find_parameter
from studio.composition.engine import compose
from studio.errors import CompositionError
from studio.models.schedulers import make_scheduler


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("place", ["linear", "conv", "text"])
def test_merge_of_two_equals_the_weighted_sum(
    place: str, short_sd: Any, make_adapter: Any, target: Any, parameter: Any, summed: Any
) -> None:
    pipe = short_sd()
    one, two = make_adapter(pipe, 1, text=True), make_adapter(pipe, 2, text=True)
    name = target[place]
    wanted = summed(pipe, [(one, 0.8), (two, -0.3)], name)
    with compose(pipe, {"one": one, "two": two}, weights={"one": 0.8, "two": -0.3}):
        got = parameter(pipe, name).double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # one rounding to fp32
    assert not torch.allclose(parameter(pipe, name).double(), wanted)


def test_weights_default_to_one(short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    adapter = make_adapter(pipe, 1)
    with compose(pipe, {"one": adapter}):
        plain = draw(pipe)
    with compose(pipe, {"one": adapter}, weights={"one": 1.0}):
        assert torch.equal(draw(pipe), plain)


def test_an_adapter_changes_the_picture_and_more_weight_changes_it_more(
    short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    base, adapter = draw(pipe), make_adapter(pipe, 1)
    distances = []
    for weight in (0.05, 0.5):
        with compose(pipe, {"one": adapter}, weights={"one": weight}):
            distances.append(float((draw(pipe) - base).abs().mean()))
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize("method", ["merge", "switch"])
def test_weight_zero_is_the_base_bit_for_bit(
    method: str, short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    base = draw(pipe)
    with compose(pipe, {"one": make_adapter(pipe, 1, text=True)}, method=method, weights={"one": 0.0}):
        assert torch.equal(draw(pipe), base)


def test_no_adapters_are_the_base(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    base = draw(pipe)
    with compose(pipe, {}):
        assert torch.equal(draw(pipe), base)


def test_switch_with_one_adapter_equals_merge(short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    adapter = make_adapter(pipe, 1, text=True)
    pictures = []
    for method in ("merge", "switch"):
        with compose(pipe, {"one": adapter}, method=method, weights={"one": 0.7}):
            pictures.append(draw(pipe))
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("solver", "calls"), [("ddim", "112211"), ("heun", "11112222111"), ("pndm", "1112211")]
)
def test_switch_puts_each_adapter_into_the_weights_at_its_turn(
    solver: str, calls: str, short_sd: Any, make_adapter: Any, draw: Any, summed: Any, watch: Any
) -> None:
    pipe = short_sd()
    pipe.scheduler = make_scheduler(pipe, solver)
    adapters = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    wanted = {name: summed(pipe, [(adapter, 0.5)]) for name, adapter in adapters.items()}
    seen, handle = watch(pipe)
    weights = dict.fromkeys(adapters, 0.5)
    with compose(pipe, adapters, method="switch", weights=weights, options={"switch_every": 2}):
        draw(pipe, steps=6)
        draw(pipe, steps=6)
    handle.remove()
    acting = ["1" if torch.allclose(value.double(), wanted["one"], atol=1e-5) else "2" for value in seen]
    assert "".join(acting) == calls + calls
    twos = [value for value, who in zip(seen, acting, strict=True) if who == "2"]
    assert all(torch.allclose(value.double(), wanted["two"], atol=1e-5) for value in twos)


def test_weights_are_merged_again_only_when_the_weighting_changes(
    short_sd: Any, make_adapter: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.composition import executor

    applied: list[Any] = []

    class Counting(executor.WeightBank):
        def apply(self, changes: Any) -> None:
            applied.append(changes)
            super().apply(changes)

    monkeypatch.setattr(executor, "WeightBank", Counting)
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    with compose(pipe, adapters):
        draw(pipe, steps=4)
    assert len(applied) == 1
    applied.clear()
    with compose(pipe, adapters, method="switch", options={"switch_every": 3}):
        draw(pipe, steps=9)
    assert len(applied) == 3


@pytest.mark.parametrize("method", ["merge", "switch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_everything_is_restored_bit_for_bit(
    method: str, dtype: torch.dtype, short_sd: Any, make_adapter: Any, draw: Any, snapshot: Any, target: Any
) -> None:
    pipe = short_sd().to(dtype)
    before, picture = snapshot(pipe), draw(pipe, steps=3)
    pointers = {
        name: find_parameter(components_of(pipe), name).data_ptr()
        for name in (target["linear"], target["text"])
    }
    adapters = {"one": make_adapter(pipe, 1, text=True), "two": make_adapter(pipe, 2, text=True)}
    for _ in range(2):
        with compose(pipe, adapters, method=method, weights={"one": 0.9}, **switching(method)):
            draw(pipe, steps=3)
    assert_equal(before, snapshot(pipe))
    assert torch.equal(draw(pipe, steps=3), picture)
    assert pointers == {
        name: find_parameter(components_of(pipe), name).data_ptr()
        for name in (target["linear"], target["text"])
    }


def switching(method: str) -> dict[str, Any]:
    return {"options": {"switch_every": 2}} if method == "switch" else {}


@pytest.mark.parametrize("method", ["merge", "switch"])
def test_an_exception_in_mid_run_restores_everything(
    method: str, short_sd: Any, make_adapter: Any, draw: Any, snapshot: Any, target: Any, parameter: Any
) -> None:
    pipe = short_sd()
    before = snapshot(pipe)
    scheduler_before = set(vars(pipe.scheduler))
    adapters = {"one": make_adapter(pipe, 1, text=True), "two": make_adapter(pipe, 2)}

    def fail(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        if index == 2:
            raise RuntimeError("the callback failed")
        return values

    with (
        pytest.raises(RuntimeError, match="the callback failed"),
        compose(pipe, adapters, method=method, **switching(method)),
    ):
        assert not torch.equal(
            parameter(pipe, target["text"]), before[target["text"].replace(".text_model", "")]
        )
        draw(pipe, steps=4, callback_on_step_end=fail)
    assert_equal(before, snapshot(pipe))
    assert not pipe.unet._forward_pre_hooks and not pipe.text_encoder._forward_pre_hooks
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
    assert scheduler_before <= set(vars(pipe.scheduler))
    with compose(pipe, adapters, method=method, **switching(method)):
        draw(pipe, steps=4)


class Operations(TorchDispatchMode):
    """Counts every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["merge", "switch"])
def test_a_forward_pass_inside_has_the_operations_of_the_base(
    method: str, short_sd: Any, make_adapter: Any
) -> None:
    pipe = short_sd()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)

    def operations() -> list[str]:
        with torch.no_grad(), Operations() as seen:
            pipe.unet(latents, timestep, encoder_hidden_states=text)
        return seen.names

    pipe.scheduler.set_timesteps(4)
    timestep = pipe.scheduler.timesteps[0]
    base = operations()
    adapters = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    with compose(pipe, adapters, method=method, **switching(method)):
        pipe.scheduler.set_timesteps(4)
        timestep = pipe.scheduler.timesteps[0]
        if method == "switch":
            assert len(operations()) > len(base)  # the call that merges
        assert operations() == base
        assert "aten._local_scalar_dense.default" not in base


def test_two_pipelines_are_composed_side_by_side(
    short_sd: Any, make_adapter: Any, draw: Any, snapshot: Any
) -> None:
    first, second = short_sd(), short_sd()
    adapters = {"one": make_adapter(first, 1), "two": make_adapter(first, 2)}
    options = {"switch_every": 1}
    with compose(first, adapters, method="switch", options=options):
        alone = draw(first)
    before = snapshot(second)
    inner: list[torch.Tensor] = []

    def other(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        inner.append(draw(second, steps=2))
        return values

    outer = compose(first, adapters, method="switch", options=options)
    with outer, compose(second, {"two": adapters["two"]}):
        assert torch.equal(draw(first, callback_on_step_end=other), alone)
    assert all(torch.equal(picture, inner[0]) for picture in inner)
    assert not torch.equal(inner[0], draw(second, steps=2))
    assert_equal(before, snapshot(second))


@pytest.mark.parametrize(
    ("policy", "spoken"), [("base", []), ("first", ["one"]), ("merged", ["one", "two"])], ids=str
)
def test_the_text_encoder_policy_of_switch_acts_on_the_text_encoder(
    policy: str, spoken: list[str], short_sd: Any, make_adapter: Any, target: Any, parameter: Any, summed: Any
) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1, text=True), "two": make_adapter(pipe, 2, text=True)}
    wanted = summed(pipe, [(adapters[name], 0.5) for name in spoken], target["text"])
    options = {"text_encoder_policy": policy}
    with compose(pipe, adapters, method="switch", weights=dict.fromkeys(adapters, 0.5), options=options):
        got = parameter(pipe, target["text"]).double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # one rounding to fp32


def test_a_prompt_encoded_before_is_said(
    short_sd: Any, make_adapter: Any, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1, text=True)}
    given = dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds"),
            pipe.encode_prompt("a fox", "cpu", 1, True),
            strict=True,
        )
    )
    with caplog.at_level(logging.WARNING), compose(pipe, adapters):
        draw(pipe, prompt=None, steps=1, **given)
    assert "encoded before compose()" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), compose(pipe, adapters):
        draw(pipe, steps=1)
    assert "encoded before" not in caplog.text


def test_image_to_image_and_inpainting_on_the_same_components_are_composed(
    short_sd: Any, make_adapter: Any, draw: Any, summed: Any, watch: Any
) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 64, 64)
    for kind, given in (("Img2Img", {}), ("Inpaint", {"mask_image": mask, "height": 64, "width": 64})):
        other = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
            **pipe.components, requires_safety_checker=False
        )
        other.set_progress_bar_config(disable=True)
        wanted = [summed(pipe, [(adapter, 1.0)]) for adapter in adapters.values()]
        seen, handle = watch(pipe)
        with compose(pipe, adapters, method="switch", options={"switch_every": 2}):
            draw(other, steps=10, image=picture, strength=0.4, **given)
        handle.remove()
        assert len(seen) == 4
        for value, index in zip(seen, (0, 0, 1, 1), strict=True):
            torch.testing.assert_close(
                value.double(), wanted[index], rtol=1e-5, atol=1e-5
            )  # rounding to fp32


def test_sdxl_with_both_text_encoders_is_composed_and_restored(
    short_sdxl: Any, make_adapter: Any, draw: Any, snapshot: Any, parameter: Any, summed: Any
) -> None:
    pipe = short_sdxl()
    targets = (
        "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc2.weight",
    )
    adapters = {"one": make_adapter(pipe, 1, targets=targets), "two": make_adapter(pipe, 2, targets=targets)}
    before, base = snapshot(pipe), draw(pipe)
    for method in ("merge", "switch"):
        wanted = summed(pipe, [(adapter, 1.0) for adapter in adapters.values()], targets[2])
        with compose(pipe, adapters, method=method, **switching(method)):
            assert torch.allclose(parameter(pipe, targets[2]).double(), wanted, atol=1e-5)
            assert not torch.equal(draw(pipe), base)
        assert_equal(before, snapshot(pipe))
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in-place"])
def test_a_compiled_denoiser_is_composed(
    in_place: bool, one_block_sd: Any, make_adapter: Any, draw: Any, target: Any
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = one_block_sd()
    base = draw(pipe, steps=2)
    adapters = {name: make_adapter(pipe, seed, targets=[target["conv"]]) for seed, name in enumerate("ab")}
    how = {"method": "switch", "options": {"switch_every": 1}}
    with compose(pipe, adapters, **how):
        wanted = draw(pipe, steps=2)
        if in_place:
            pipe.unet.compile(backend=count)
            assert torch.equal(draw(pipe, steps=2), wanted)
    if not in_place:
        pipe.unet = torch.compile(pipe.unet, backend=count)
    call = vars(pipe.unet).get("_compiled_call_impl")
    assert in_place is (call is not None)
    with compose(pipe, adapters, **how):
        assert torch.equal(draw(pipe, steps=2), wanted)
    assert vars(pipe.unet).get("_compiled_call_impl") is call
    assert torch.equal(draw(pipe, steps=2), base)
    with (
        compose(pipe, adapters, modifiers={"cache": {"interval": 2}}),
        pytest.raises(CompositionError, match="features cannot be kept of a compiled UNet"),
    ):
        draw(pipe, steps=2)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_the_table_of_a_composition_can_be_printed(short_sd: Any, make_adapter: Any) -> None:
    pipe = short_sd()
    with contextlib.nullcontext(
        compose(pipe, {"one": make_adapter(pipe, 1)}, weights={"one": 0.3})
    ) as composition:
        assert [(row.adapter, row.weights) for row in composition.describe(2)] == [("one", (0.3, 0.3))]


@pytest.mark.parametrize("method", ["switch", "composite"])
def test_a_composition_may_be_entered_again_after_it_was_left(
    method: str, short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    composition = compose(
        pipe, {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}, method=method, **switching(method)
    )
    drawn = []
    for _ in range(2):
        with composition:
            drawn.append(draw(pipe, steps=3))
    assert torch.equal(*drawn)
