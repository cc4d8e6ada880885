"""`studio convert --dense`: any adapter as differences that need no knowledge of its kind."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio import cli
from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.dora import DoraChange
from studio.adapters.names import kohya_module
from studio.adapters.origin import origin_facts
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.conversion import convert_file, in_full
from studio.errors import UsageError
from studio.models.base import load_base
from studio.registry import KINDS

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
POINTWISE = "unet.down_blocks.0.attentions.0.proj_in"
KERNEL = "unet.mid_block.resnets.0.conv1"
PER_INPUT = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def pipe(tiny_base: str) -> Any:
    return load_base(tiny_base, device="cpu", precision="fp32")


def dora(pipe: Any) -> Adapter:
    """Return a DoRA on layers of every shape, with lengths near the base's as training leaves them."""
    generator, changes = torch.Generator().manual_seed(0), {}
    for module in (LINEAR, POINTWISE, KERNEL, PER_INPUT):
        weight = find_parameter(components_of(pipe), f"{module}.weight").detach()
        sample = DoraChange.sample(tuple(weight.shape), generator=generator)
        per_input = module == PER_INPUT
        others = [axis for axis in range(weight.ndim) if axis != int(per_input)]
        lengths = weight.square().sum(others).sqrt()
        lengths = lengths * (0.9 + 0.2 * torch.rand(lengths.shape, generator=generator))
        changes[f"{module}.weight"] = DoraChange(sample.direction, lengths, per_input)
    return Adapter("dora", "dora", changes, metadata=origin_facts(pipe))


@pytest.fixture
def file(pipe: Any, tmp_path: Path) -> Path:
    return save_adapter(dora(pipe), tmp_path / "dora.safetensors", dtype=torch.float32)


def formula(base: torch.Tensor, tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return ``m V / ||V|| - W`` in fp64 from the tensors of a LyCORIS file. arXiv:2402.09353, Eq. 5."""
    down, up, magnitude = (
        tensors[f"{key}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight", "dora_scale")
    )
    scale = tensors[f"{key}.alpha"].double() / down.shape[0]
    weight = base.double()
    turned = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    others = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1]
    return magnitude * turned / turned.square().sum(others, keepdim=True).sqrt() - weight


def test_dense_file_of_a_dora_holds_the_papers_formula(
    pipe: Any, file: Path, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dense.safetensors"
    assert cli.main(["convert", str(file), "--base", tiny_base, "--dense", "--output", str(output)]) == 0
    layers = {
        module: find_parameter(components_of(pipe), f"{module}.weight").detach()
        for module in (LINEAR, POINTWISE, KERNEL, PER_INPUT)
    }
    size = 4 * sum(weight.numel() for weight in layers.values()) / 1e6
    assert f"dense changes hold every entry of 4 parameters: about {size:.1f} MB" in capsys.readouterr().err
    found, given = safetensors.torch.load_file(output), safetensors.torch.load_file(file)
    keys = {module: kohya_module(module, sdxl=False) for module in layers}
    assert found.keys() == {f"{key}.diff" for key in keys.values()}
    for module, weight in layers.items():
        diff, wanted = found[f"{keys[module]}.diff"], formula(weight, given, keys[module])
        assert diff.dtype == torch.float32 and diff.shape == weight.shape
        assert wanted.abs().max() > 0.1
        assert (diff - wanted).abs().max() <= 1e-6 * wanted.abs().max(), module  # A few roundings to fp32.


def test_dense_file_makes_the_weights_that_the_dora_makes_bit_for_bit(
    pipe: Any, file: Path, tmp_path: Path, tiny_base: str
) -> None:
    dense = convert_file(
        file, tmp_path / "dense.safetensors", base=tiny_base, format="kohya", dense=True, say=lambda _: None
    )

    def weights(path: Path) -> dict[str, torch.Tensor]:
        adapter, components = load_adapter(path, base=pipe), components_of(pipe)
        with WeightBank(components, adapter.changes) as bank:
            bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
            return {name: find_parameter(components, name).detach().clone() for name in adapter.changes}

    wanted, got = weights(file), weights(dense)
    assert len(wanted) == 4 and wanted.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", KINDS.names())
def test_changes_of_every_kind_can_be_written_in_full(pipe: Any, kind: str, tmp_path: Path) -> None:
    components, generator = components_of(pipe), torch.Generator().manual_seed(1)
    names = [f"{LINEAR}.weight", f"{KERNEL}.weight"]
    changes = {
        name: KINDS[kind].sample(canonical_names(components)[name], generator=generator) for name in names
    }
    full = in_full(Adapter("a", kind, changes), pipe)
    read = load_adapter(save_adapter(full, tmp_path / "full.safetensors"), base=pipe)
    assert full.kind == read.kind == "full"
    for name, weight in itertools.product(names, (1.0, 0.5)):
        base = find_parameter(components, name).detach()
        wanted = weight * changes[name].delta(base, weight=1.0)
        assert torch.equal(read.changes[name].delta(base, weight=weight), wanted), name


def test_another_base_is_refused_because_the_lengths_are_not_its_own(
    file: Path, tiny_sd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_sd()
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    other.save_pretrained(tmp_path / "other")
    words = ["convert", str(file), "--base", str(tmp_path / "other"), "--dense"]
    assert cli.main([*words, "--output", str(tmp_path / "a.safetensors")]) == 1
    assert "dora.safetensors was trained on another base model" in capsys.readouterr().err
    assert cli.main([*words, "--any-base", "--output", str(tmp_path / "b.safetensors")]) == 0
    named = load_adapter(tmp_path / "b.safetensors").metadata["studio.base"]
    assert named == origin_facts(other)["studio.base"]


def test_dense_says_what_does_not_go_with_it(
    file: Path, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "convert",
        str(file),
        "--base",
        tiny_base,
        "--dense",
        "--output",
        str(tmp_path / "a.safetensors"),
    ]
    assert cli.main([*words, "--format", "diffusers"]) == 1
    assert "diffusers reads LoRA and DoRA only" in capsys.readouterr().err
    with pytest.raises(
        UsageError, match=r"dense changes have full rank, rank asks for a low one\. Give one of"
    ):
        convert_file(
            file, tmp_path / "a.safetensors", base=tiny_base, format="kohya", dense=True, rank=4, say=print
        )
    assert not (tmp_path / "a.safetensors").exists()
