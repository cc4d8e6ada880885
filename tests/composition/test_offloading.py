"""Offloading: accelerate and diffusers bring weights where they are used, by hooks of their own."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.composition.engine import compose
from studio.errors import CompositionError

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # four steps of 1e-5
METHODS: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge"},
    "switch": {"method": "switch", "options": {"switch_every": 1}},
    "composite": {"method": "composite"},
    "cached": {"modifiers": {"cache": {"interval": 2, "full_first": 0, "full_last": 0}}},
}


def offload_by_accelerate(pipe: Any, kind: str) -> None:
    """Offload a pipeline from the CPU to the CPU."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device=CPU)
        return
    # As the pipeline's own method, which gives the device a number that accelerate mistakes on a CPU.
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(part, CPU)


def in_groups(module: Any, level: str = "block_level", **more: Any) -> list[Any]:
    """Offload a module in groups, from the CPU to the CPU; return the groups."""
    apply_group_offloading(
        module, onload_device=CPU, offload_device=CPU, offload_type=level, num_blocks_per_group=1, **more
    )
    registries = [vars(part).get("_diffusers_hook") for part in module.modules()]
    return [each.get_hook("group_offloading").group for each in registries if each is not None]


def with_streams(module: Any, level: str = "block_level") -> None:
    """Offload a module as with ``use_stream``, which wants a GPU: here the stream has nothing to do."""
    stream = SimpleNamespace(synchronize=lambda: None)
    device = SimpleNamespace(stream=lambda _: nullcontext(), current_stream=lambda: stream)
    for group in in_groups(module, level):
        if module in (group.onload_leader, group.offload_leader):
            # What is in no block moves without a stream.
            continue
        kept = {each: each.data.clone() for part in group.modules for each in part.parameters()}
        group.stream, group._torch_accelerator_module, group.cpu_param_dict = stream, device, kept
        # As a GPU would have them: in memory of their own.
        group._pinned_memory_tensors = lambda kept=kept: nullcontext(
            {parameter: tensor.clone() for parameter, tensor in kept.items()}
        )
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(LazyPrefetchGroupOffloadingHook(), "lazy_prefetch_group_offloading")


@pytest.fixture(scope="module")
def plain(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def unspoken(plain: Any, make_adapter: Any, target: Any) -> dict[str, Any]:
    names = (target["linear"], "unet.up_blocks.1.resnets.0.conv1.weight", "unet.conv_in.weight")
    return {"one": make_adapter(plain, 1, targets=names), "two": make_adapter(plain, 2, targets=names)}


@pytest.fixture
def pair(plain: Any, unspoken: Any, make_adapter: Any, target: Any) -> dict[str, Any]:
    return {**unspoken, "said": make_adapter(plain, 3, targets=(target["text"], target["linear"]))}


@pytest.mark.parametrize("name", [*METHODS, "negative"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_each_picture_of_an_offloaded_pipeline_is_composed(
    kind: str, name: str, plain: Any, short_sd: Any, unspoken: Any, draw: Any
) -> None:
    how = METHODS.get(name, {"modifiers": {"negative": {"adapters": ["two"]}}})
    base = draw(plain)
    with compose(plain, unspoken, **how) as composition:
        wanted = draw(plain)
    passes = composition.passes.full
    pipe = short_sd()
    offload_by_accelerate(pipe, kind)
    with compose(pipe, unspoken, **how) as composition:
        # At the end of a picture diffusers takes the hooks of model offload away and puts them back.
        drawn = [draw(pipe) for _ in range(2)]
    assert torch.equal(*drawn) and composition.passes.full == 2 * passes
    # Layer by layer adapters act beside the weights, which sums in another order.
    near = CLOSE if kind == "sequential" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(drawn[0], wanted, **near)
    assert torch.equal(draw(pipe), base)
    assert hasattr(pipe.unet, "_hf_hook") and "_compiled_call_impl" not in vars(pipe.unet)


def test_offloading_that_was_turned_on_meanwhile_stays(
    short_sd: Any, pair: Any, draw: Any, snapshot: Any
) -> None:
    pipe = short_sd()
    before, base = snapshot(pipe), draw(pipe)
    with compose(pipe, pair, method="composite"):
        wanted = draw(pipe)
        offload_by_accelerate(pipe, "model")
        assert torch.equal(draw(pipe), wanted)
    after = snapshot(pipe)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert "forward" in vars(pipe.unet) and "forward" not in vars(pipe.unet.conv_in)
    assert torch.equal(draw(pipe), base)


def test_adapters_beside_the_weights_outlast_the_hooks_of_layers(
    plain: Any, short_sd: Any, unspoken: Any, draw: Any
) -> None:
    base, pipe = draw(plain), short_sd()
    offload_by_accelerate(pipe, "sequential")
    with compose(pipe, unspoken):
        wanted = draw(pipe)
        pipe.remove_all_hooks()
        assert torch.equal(draw(pipe), wanted)
    assert torch.equal(draw(pipe), base)
    with (
        compose(pipe, unspoken),
        pytest.raises(CompositionError, match="offloaded layer by layer inside the 'with' block"),
    ):
        offload_by_accelerate(pipe, "sequential")
        draw(pipe)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_move_in_groups_are_composed_and_come_back_bit_for_bit(
    name: str, plain: Any, short_sd: Any, pair: Any, draw: Any, snapshot: Any
) -> None:
    with compose(plain, pair, **METHODS[name]):
        wanted = draw(plain)
    pipe = short_sd()
    for part in (pipe.unet, pipe.text_encoder):
        in_groups(part)
    before = snapshot(pipe)
    with compose(pipe, pair, **METHODS[name]):
        assert torch.equal(draw(pipe), wanted)
    after = snapshot(pipe)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_with_streams_adapters_act_beside_the_weights(
    name: str, plain: Any, short_sd: Any, unspoken: Any, draw: Any
) -> None:
    with compose(plain, unspoken, **METHODS[name]):
        wanted = draw(plain)
    base = draw(plain)
    pipe = short_sd()
    with_streams(pipe.unet)
    assert torch.equal(draw(pipe), base)
    with compose(pipe, unspoken, **METHODS[name]):
        torch.testing.assert_close(draw(pipe), wanted, **CLOSE)
    assert torch.equal(draw(pipe), base)


def test_an_exception_within_a_layer_leaves_streams_the_bases_weights(
    plain: Any, short_sd: Any, unspoken: Any, draw: Any
) -> None:
    pipe = short_sd()
    with_streams(pipe.unet)
    draw(pipe, steps=1)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.mid_block.resnets[1].conv1.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), compose(pipe, unspoken):
        draw(pipe)
    handle.remove()
    assert torch.equal(draw(pipe), draw(plain))


def unordered(pipe: Any, folder: Any) -> None:
    with_streams(pipe.unet)


def spoken(pipe: Any, folder: Any) -> None:
    with_streams(pipe.text_encoder, "leaf_level")


def on_disk(pipe: Any, folder: Any) -> None:
    in_groups(pipe.unet, offload_to_disk_path=str(folder))


@pytest.mark.parametrize(
    ("offload", "says"),
    [
        (unordered, "in which order the layers of unet run. Call the pipeline once"),
        (spoken, "of text_encoder from copies of its own.*exclude_modules='text_encoder'"),
        (on_disk, "of unet lie on disk between uses.*Leave offload_to_disk_path out"),
    ],
    ids=["unordered", "text-encoder", "disk"],
)
def test_groups_that_would_lose_what_is_composed_are_refused(
    offload: Callable[..., None], says: str, short_sd: Any, unspoken: Any, tmp_path: Any
) -> None:
    pipe = short_sd()
    offload(pipe, tmp_path)
    with pytest.raises(CompositionError, match=says):
        compose(pipe, unspoken)


def test_with_streams_a_change_without_low_rank_is_refused(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    name = "unet.up_blocks.1.resnets.0.conv1.weight"
    change = FullChange(torch.zeros(pipe.unet.up_blocks[1].resnets[0].conv1.weight.shape))
    with_streams(pipe.unet)
    draw(pipe, steps=1)
    with pytest.raises(CompositionError, match=r"with streams.*'dense' cannot act beside them"):
        compose(pipe, {"dense": Adapter("dense", "full", {name: change})})
