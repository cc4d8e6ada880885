"""A quantised UNet computes with what its layers unpack to, keeps its names and its fingerprint."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from studio.adapters.parameters import canonical_names, components_of
from studio.errors import BaseModelError, UsageError
from studio.models import quantization
from studio.models.base import load_base
from studio.models.fingerprint import fingerprint
from studio.models.quantization import (
    check_quantization,
    quantization_of,
    quantize,
    statistics,
    weight_shape,
)

CPU = torch.device("cpu")
KINDS = ("int8", "nf4")


def test_a_machine_without_bitsandbytes_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    for kind in KINDS:
        with pytest.raises(
            UsageError, match=rf"'{kind}' needs bitsandbytes.*pip install 'diffusion-studio\[gpu\]'"
        ):
            load_base("starter", device="cpu", quantize_base=kind)  # type: ignore[arg-type]
    check_quantization("none", CPU)


def test_a_device_that_bitsandbytes_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(supported_torch_devices={"cuda"}))
    with pytest.raises(UsageError, match=r"cannot work on 'cpu'. Use a GPU, update it"):
        check_quantization("nf4", CPU)
    with pytest.raises(UsageError, match=r"unknown 'fp7'. Choose none, int8 or nf4"):
        check_quantization("fp7", CPU)


def test_plain_weights_have_their_own_shape_and_nothing_beside_them() -> None:
    layer = nn.Linear(6, 4)
    assert weight_shape(layer.weight) == (4, 6)
    assert quantization_of(layer) == "none" and not list(statistics(layer))


def test_a_base_without_transformer_blocks_has_nothing_to_quantise() -> None:
    pytest.importorskip("bitsandbytes", reason="quantises nothing")
    with pytest.raises(BaseModelError, match="no transformer blocks"):
        quantize(nn.Sequential(nn.Linear(4, 4)), "nf4", device=CPU)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, short_sd: Callable[[], Any]) -> tuple[str, Any, Any]:
    """Return a kind, a pipeline, and the same one quantised."""
    pytest.importorskip("bitsandbytes", reason="it quantises")
    plain, quantized = short_sd(), short_sd()
    quantize(quantized.unet, request.param, device=CPU)
    return request.param, plain, quantized


def test_the_linear_layers_of_transformer_blocks_are_quantised_and_no_others(pair: Any) -> None:
    kind, plain, quantized = pair
    assert (quantization_of(plain.unet), quantization_of(quantized.unet)) == ("none", kind)
    changed = {
        name
        for name, layer in plain.unet.named_modules()
        if type(layer) is not type(quantized.unet.get_submodule(name))
    }
    linear = {name for name, layer in plain.unet.named_modules() if isinstance(layer, nn.Linear)}
    assert changed == {name for name in linear if ".transformer_blocks." in name}
    assert canonical_names(components_of(plain)) == canonical_names(components_of(quantized))
    assert not any(parameter.requires_grad for parameter in quantized.unet.parameters())


def test_a_quantised_base_is_known_by_the_weights_it_was_made_of(pair: Any) -> None:
    _, plain, quantized = pair
    for dtypes in ((), (torch.float16,)):
        assert fingerprint(plain, dtypes=dtypes) == fingerprint(quantized, dtypes=dtypes)


def test_layers_multiply_by_the_weights_that_they_unpack_to(pair: Any) -> None:
    kind, plain, quantized = pair
    generator = torch.Generator().manual_seed(0)
    for name, own in plain.unet.named_modules():
        layer = quantized.unet.get_submodule(name)
        if type(own) is type(layer):
            continue
        unpacked = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).double()
        # Half of NF4's widest gap is 0.15 of a block's largest value, half of 8 bits' is 1 / 254.
        largest = own.weight.abs().max()
        assert (unpacked - own.weight).abs().max() < {"nf4": 0.3, "int8": 0.005}[kind] * largest
        given = torch.randn(3, own.in_features, generator=generator)
        bias = 0 if own.bias is None else own.bias.double()
        wanted = given.double() @ unpacked.mT + bias
        # LLM.int8() rounds the inputs, too, to 1 / 254 of their largest, and 32 to 128 of them are added up.
        bound = 1e-5 if kind == "nf4" else 0.03
        assert (layer(given) - wanted).abs().max() < bound * wanted.abs().max()


def test_memory_beside_the_packed_weights_is_counted(pair: Any) -> None:
    kind, _, quantized = pair
    layer = quantized.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    numbers = 32 * 32
    beside = sum(value.numel() * value.element_size() for value in statistics(layer))
    if kind == "int8":
        assert beside == 4 * 32
    else:
        # A byte for each block of 64, fp32 for each 256 of these and for their mean, and the two tables.
        assert beside == numbers // 64 + 4 + 4 + 4 * 16 + 4 * 256
    assert layer.weight.numel() == (numbers if kind == "int8" else numbers // 2)


def test_a_base_is_quantised_as_it_is_loaded(short_sd: Callable[[], Any], tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="it quantises")
    short_sd().save_pretrained(tmp_path / "base")
    pipe = load_base(tmp_path / "base", device="cpu", quantize_base="nf4")
    assert quantization_of(pipe.unet) == "nf4" and quantization_of(pipe.text_encoder) == "none"
    assert fingerprint(pipe) == fingerprint(load_base(tmp_path / "base", device="cpu"))
