"""Sparse adapters, which change biases and norms too, alone, together, and beside a LoRA."""

from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.composition.engine import compose

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
NORM = "unet.mid_block.resnets.0.norm1.bias"
CONV = "unet.mid_block.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def short_sd(short_sd: Any) -> Any:
    """Return the factory of short pipelines: the adapters here change every parameter."""
    return short_sd


def sparse(pipe: Any, seed: int) -> Adapter:
    """Return a change of some entries of every parameter of the UNet, and of one weight of the encoder."""
    generator = torch.Generator().manual_seed(seed)
    changes = {
        name: SparseChange.sample(shape, generator=generator)
        for name, shape in canonical_names(components_of(pipe)).items()
        if name.startswith("unet.") or name == TEXT
    }
    return Adapter(f"sparse{seed}", "sparse", changes)


def adapters_for(pipe: Any, make_adapter: Any, names: str) -> dict[str, Adapter]:
    made = {
        "one": sparse(pipe, 1),
        "two": sparse(pipe, 2),
        "lora": make_adapter(pipe, 3, targets=[CONV], text=True),
    }
    return {name: made[name] for name in names.split("+")}


def switching(method: str) -> dict[str, Any]:
    return {"options": {"switch_every": 2}} if method == "switch" else {}


def value(pipe: Any, name: str) -> torch.Tensor:
    return find_parameter(components_of(pipe), name).detach()


@pytest.mark.parametrize("names", ["one", "one+two", "one+lora", "lora+one+two"])
@pytest.mark.parametrize("method", ["merge", "switch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_everything_is_restored_bit_for_bit(
    dtype: torch.dtype, method: str, names: str, short_sd: Any, make_adapter: Any, draw: Any, snapshot: Any
) -> None:
    pipe = short_sd().to(dtype)
    before, adapters = snapshot(pipe), adapters_for(pipe, make_adapter, names)
    picture = draw(pipe, steps=6)
    for weight in (0.3, 0.0):
        weights = dict.fromkeys(adapters, weight)
        with compose(pipe, adapters, method=method, weights=weights, **switching(method)):
            # Of weight 0 they are the base, bit for bit.
            assert torch.equal(draw(pipe, steps=6), picture) == (weight == 0)
    after = snapshot(pipe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(draw(pipe, steps=6), picture)


@pytest.mark.parametrize("name", [TEXT, NORM, CONV])
def test_merge_of_sparse_adapters_and_a_lora_is_the_weighted_sum(
    name: str, short_sd: Any, make_adapter: Any
) -> None:
    pipe = short_sd()
    adapters = adapters_for(pipe, make_adapter, "one+two+lora")
    weights = {"one": 0.6, "two": 2.0, "lora": -0.4}
    wanted = value(pipe, name).double()
    for key, adapter in adapters.items():
        if name in adapter.changes:
            wanted = (
                wanted + weights[key] * adapter.changes[name].delta(value(pipe, name), weight=1.0).double()
            )
    with compose(pipe, adapters, weights=weights):
        got = value(pipe, name).double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # One rounding to fp32.


def test_switch_takes_turns_in_norms_that_only_sparse_adapters_change(
    short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    adapters = adapters_for(pipe, make_adapter, "one+lora+two")
    plain = value(pipe, NORM).clone()
    wanted = {
        key: plain + (adapter.changes[NORM].delta(plain, weight=1.0) if NORM in adapter.changes else 0)
        for key, adapter in adapters.items()
    }
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda *_: seen.append(value(pipe, NORM).clone()))
    with compose(pipe, adapters, method="switch", options={"switch_every": 2}):
        draw(pipe, steps=6)
    handle.remove()
    acting = [next(key for key in adapters if torch.equal(now, wanted[key])) for now in seen]
    assert acting == ["one", "one", "lora", "lora", "two", "two"]
    assert torch.equal(wanted["lora"], plain)


def test_an_exception_in_mid_run_restores_everything(
    short_sd: Any, make_adapter: Any, draw: Any, snapshot: Any
) -> None:
    pipe = short_sd()
    before, adapters = snapshot(pipe), adapters_for(pipe, make_adapter, "one+lora")

    def fail(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed"), compose(pipe, adapters):
        assert not torch.equal(value(pipe, NORM), before[NORM])
        draw(pipe, steps=2, callback_on_step_end=fail)
    after = snapshot(pipe)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
