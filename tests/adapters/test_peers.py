"""Our files in the hands of other tools, compared with what the weight bank makes of the same adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.names import kohya_module
from studio.adapters.parameters import canonical_names, components_of, find_parameter


def _mixed(adapter: Adapter) -> Adapter:
    """Return the adapter with different alphas, the case in which files go wrong unless they are folded."""
    changes = {
        name: LoraChange(change.down, change.up, 1.0 + index % 3)
        for index, (name, change) in enumerate(adapter.changes.items())
        if isinstance(change, LoraChange)
    }
    return Adapter("style", "lora", changes)


def _weights(pipe: Any) -> dict[str, torch.Tensor]:
    components = components_of(pipe)
    return {name: find_parameter(components, name).detach().clone() for name in canonical_names(components)}


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_makes_the_same_weights_of_our_file(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    everywhere: Callable[..., Adapter],
    form: str,
    model: str,
) -> None:
    fresh, weight = request.getfixturevalue(model), 0.5
    ours, theirs, plain = fresh(), fresh(), _weights(fresh())
    adapter = _mixed(everywhere(ours))
    path = save_adapter(adapter, tmp_path / "style.safetensors", format=form, dtype=torch.float32)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    parts = list(components_of(theirs))
    theirs.fuse_lora(components=parts, lora_scale=weight)
    with WeightBank(components_of(ours), adapter.changes) as bank:
        bank.apply({name: [(change, weight)] for name, change in adapter.changes.items()})
        wanted, got = _weights(ours), _weights(theirs)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= 1e-5, name  # Folded scales are rounded once to fp32.
        changed = not torch.equal(got[name], plain[name])
        assert changed == (name in adapter.changes), name


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_with_our_file(
    tmp_path: Path, tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], form: str
) -> None:
    ours, theirs = tiny_sd(), tiny_sd()
    adapter = everywhere(ours)
    save_adapter(adapter, tmp_path / "style.safetensors", format=form, dtype=torch.float32)
    theirs.load_lora_weights(tmp_path, weight_name="style.safetensors", use_safetensors=True)

    def draw(pipe: Any) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(1)
        latents = pipe("a dog", num_inference_steps=2, generator=seeded, output_type="latent").images
        assert isinstance(latents, torch.Tensor)
        return latents

    plain = draw(ours)
    with WeightBank(components_of(ours), adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        merged = draw(ours)
    scale = merged.abs().max()
    assert (merged - plain).abs().max() > 0.01 * scale
    assert (
        draw(theirs) - merged
    ).abs().max() <= 1e-4 * scale  # Two layers of fp32 sums over a whole network, twice.
    assert torch.equal(draw(ours), plain)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_file_that_diffusers_writes_is_read_with_its_alpha(
    tmp_path: Path, request: pytest.FixtureRequest, model: str
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, base = request.getfixturevalue(model)(), request.getfixturevalue(model)()
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_out.0", "conv1"]
    )
    pipe.unet.add_adapter(config)
    pipe.text_encoder.add_adapter(
        LoraConfig(r=4, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj"])
    )
    layers = {
        "unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        "text_encoder_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(pipe.text_encoder)
        ),
    }
    configs = {
        "unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config["default"].to_dict(),
    }
    pipe.save_lora_weights(tmp_path, weight_name="theirs.safetensors", **layers, **configs)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    adapter = load_adapter(tmp_path / "theirs.safetensors", base=base)
    with WeightBank(components_of(base), adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        got, wanted = _weights(base), _weights(pipe)
    assert (
        max((got[name] - wanted[name]).abs().max().item() for name in wanted) <= 1e-5
    )  # fp32 sums in two orders.
    assert any(".conv1." in name for name in adapter.changes)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_lycoris_reads_our_kohya_file_layer_by_layer(
    tmp_path: Path, request: pytest.FixtureRequest, everywhere: Callable[..., Adapter], model: str
) -> None:
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    pipe = request.getfixturevalue(model)()
    adapter = _mixed(everywhere(pipe))
    path = save_adapter(adapter, tmp_path / "style.safetensors", dtype=torch.float32)
    tensors = safetensors.torch.load_file(path)
    components, seen = components_of(pipe), set()
    for name, change in adapter.changes.items():
        key = kohya_module(name.removesuffix(".weight"), sdxl=model == "tiny_sdxl")
        base = find_parameter(components, name)
        delta, _ = _of_lycoris(modules, tensors, key, base.shape).get_diff_weight(
            multiplier=0.7, shape=base.shape
        )
        wanted = change.delta(base, weight=0.7)
        assert (delta - wanted).abs().max() <= 2e-5 * max(1.0, wanted.abs().max().item()), (
            name
        )  # fp32 in other orders.
        seen |= {tensor for tensor in tensors if tensor.startswith(f"{key}.")}
    assert seen == tensors.keys()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_lycoris_makes_the_same_weights_and_biases_of_our_dense_file(
    tmp_path: Path, request: pytest.FixtureRequest, everywhere: Callable[..., Adapter], kind: str, model: str
) -> None:
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    pipe = request.getfixturevalue(model)()
    adapter, components = everywhere(pipe, kind=kind), components_of(pipe)
    path = save_adapter(adapter, tmp_path / "style.safetensors")
    tensors = safetensors.torch.load_file(path)
    seen = set()
    for module in dict.fromkeys(name.rpartition(".")[0] for name in adapter.changes):
        key = kohya_module(module, sdxl=model == "tiny_sdxl")
        found = {
            leaf: find_parameter(components, f"{module}.{leaf}").detach()
            for leaf in ("weight", "bias")
            if f"{module}.{leaf}" in adapter.changes
        }
        theirs = _of_lycoris(modules, tensors, key, found["weight"].shape)
        deltas = dict(zip(("weight", "bias"), theirs.get_diff_weight(multiplier=0.5), strict=True))
        for leaf, base in found.items():
            # The same numbers, times a power of two: no rounding anywhere.
            assert torch.equal(
                deltas[leaf].reshape(base.shape), adapter.changes[f"{module}.{leaf}"].delta(base, weight=0.5)
            ), (module, leaf)
        seen |= {tensor for tensor in tensors if tensor.startswith(f"{key}.")}
    assert seen == tensors.keys()
    assert any(tensor.endswith(".b_norm") for tensor in seen)


def _of_lycoris(modules: Any, tensors: dict[str, torch.Tensor], key: str, shape: torch.Size) -> Any:
    """Return LyCORIS' module for what the file holds under a key, around a layer of that shape."""
    kind, parameters = modules.get_module(tensors, key)
    if len(shape) == 1:
        layer: torch.nn.Module = torch.nn.LayerNorm(shape)
    elif len(shape) == 2:
        layer = torch.nn.Linear(*shape[::-1])
    else:
        layer = _convolution(shape)
    return modules.make_module(kind, parameters, key, layer)


def _convolution(shape: torch.Size) -> torch.nn.Conv2d:
    out_channels, in_channels, height, width = shape
    return torch.nn.Conv2d(in_channels, out_channels, (height, width))
