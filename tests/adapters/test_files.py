"""Adapter files of our own: written whole or not at all, with what other tools look for, and read again."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import detect_format, load_adapter, read_header, save_adapter
from studio.adapters.kinds.lora import LoraChange
from studio.errors import AdapterError, OutputError, UsageError
from studio.registry import FORMATS, KINDS

Factory = Callable[[], Any]
Everywhere = Callable[..., Adapter]
KeptAs = Mapping[tuple[str, str], str | None]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def _differences(one: Adapter, two: Adapter) -> float:
    assert one.changes.keys() == two.changes.keys()
    gaps = []
    generator = torch.Generator().manual_seed(5)
    for name, change in one.changes.items():
        base = torch.randn(change.shape, generator=generator)
        gaps.append(
            (change.delta(base, weight=1.0) - two.changes[name].delta(base, weight=1.0)).abs().max().item()
        )
    return max(gaps)


def _mixed(adapter: Adapter) -> Adapter:
    """Return the adapter with a rank and an alpha of its own in every layer, which files must fold."""
    generator = torch.Generator().manual_seed(9)
    changes = {}
    for index, (name, change) in enumerate(adapter.changes.items()):
        rank = 1 + index % 4
        down = torch.randn(rank, *change.shape[1:], generator=generator)
        up = torch.randn(change.shape[0], rank, *(1 for _ in change.shape[2:]), generator=generator)
        changes[name] = LoraChange(down, up, alpha=0.5 + index % 3)
    return Adapter("style", "lora", changes)


@pytest.mark.parametrize("model", ["short_sd", "tiny_sdxl"])
@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_adapter_of_every_kind_comes_back_from_every_format_that_holds_it(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    everywhere: Everywhere,
    kept_as: KeptAs,
    kind: str,
    form: str,
    model: str,
) -> None:
    pipe = request.getfixturevalue(model)()
    adapter = everywhere(pipe, kind=kind)
    if kept_as[kind, form] is None:
        with pytest.raises(AdapterError, match=f"'style' cannot be written in the format '{form}': "):
            save_adapter(adapter, tmp_path / "style.safetensors", format=form)
        return
    path = save_adapter(adapter, tmp_path / "style.safetensors", format=form, dtype=torch.float32)
    assert detect_format(read_header(path), path.name) == form
    for base in (pipe, None):
        again = load_adapter(path, base=base)
        assert (again.name, again.kind) == ("style", kept_as[kind, form])
        assert _differences(adapter, again) < 1e-5  # The folded scale's rounding in fp32.


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_mixed_ranks_and_alphas_survive_both_formats_and_the_way_between(
    tmp_path: Path, tiny_sdxl: Factory, everywhere: Everywhere, form: str
) -> None:
    pipe = tiny_sdxl()
    adapter = _mixed(everywhere(pipe))
    path = save_adapter(adapter, tmp_path / "a.safetensors", format=form, dtype=torch.float32)
    again = load_adapter(path, base=pipe)
    assert _differences(adapter, again) < 1e-5  # Folded scales are rounded to fp32.
    other = {"diffusers": "kohya", "kohya": "diffusers"}[form]
    path = save_adapter(again, tmp_path / "b.safetensors", format=other, dtype=torch.float32)
    assert _differences(adapter, load_adapter(path, base=pipe)) < 1e-5  # And once more.


def test_kohya_file_holds_one_alpha_and_no_peft_metadata(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere
) -> None:
    adapter = _mixed(everywhere(short_sd()))
    adapter = Adapter(
        "style", "lora", adapter.changes, metadata={"lora_adapter_metadata": "{}", "note": "kept"}
    )
    path = save_adapter(adapter, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{}"})
    tensors = safetensors.torch.load_file(path)
    alphas = {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == 1 and all(
        tensor.ndim == 0 for key, tensor in tensors.items() if key.endswith(".alpha")
    )
    metadata = read_header(path).metadata
    assert "lora_adapter_metadata" not in metadata and metadata["note"] == "kept"
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["ss_network_alpha"] == f"{alphas.pop():g}"


def test_sdxl_files_speak_sgm_and_sd_files_diffusers(
    tmp_path: Path, short_sd: Factory, tiny_sdxl: Factory, everywhere: Everywhere
) -> None:
    for pipe, own in (
        (
            tiny_sdxl(),
            {"lora_unet_input", "lora_unet_middle", "lora_unet_output", "lora_te1_text", "lora_te2_text"},
        ),
        (short_sd(), {"lora_unet_down", "lora_unet_mid", "lora_unet_up", "lora_te_text"}),
    ):
        path = save_adapter(everywhere(pipe), tmp_path / "a.safetensors", overwrite=True)
        starts = {"_".join(key.split("_")[:3]) for key in read_header(path).tensors}
        assert starts == own


def test_metadata_decides_on_sgm_names_where_layers_do_not_tell(tmp_path: Path) -> None:
    name = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    change = KINDS["lora"].sample((32, 32), generator=torch.Generator())
    adapter = Adapter("a", "lora", {name: change}, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    assert "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q.alpha" in read_header(path).tensors


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_files_are_plain(
    tmp_path: Path,
    short_sd: Factory,
    everywhere: Everywhere,
    kept_as: KeptAs,
    kind: str,
    form: str,
    dtype: torch.dtype,
) -> None:
    if kept_as[kind, form] is None:
        pytest.skip(f"{form} holds no {kind} changes")
    path = save_adapter(
        everywhere(short_sd(), kind=kind), tmp_path / "a.safetensors", format=form, dtype=dtype
    )
    types = {".alpha": torch.float32, ".gaps": torch.int16, ".shape": torch.int64}
    for key, tensor in safetensors.torch.load_file(path).items():
        assert tensor.is_contiguous() and tensor.numel() and tensor.isfinite().all()
        assert tensor.dtype == types.get(key[key.rindex(".") :], dtype)
    assert all(isinstance(value, str) for value in read_header(path).metadata.values())


def test_hashes_are_those_that_other_tools_compute(tmp_path: Path) -> None:
    # Large enough that the stretch of the legacy hash, at 1 MiB, lies inside the file.
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(600, 768, generator=generator), torch.randn(320, 600, generator=generator)
    adapter = Adapter("a", "lora", {f"unet.{LAYER}.weight": LoraChange(down, up, 1.0)})
    path = save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    raw, metadata = path.read_bytes(), read_header(path).metadata
    start = 8 + int.from_bytes(raw[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    kohyas = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    legacy = safetensors.torch.save(safetensors.torch.load_file(path), kohyas)[0x100000:0x110000]
    assert len(legacy) == 0x10000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(legacy).hexdigest()[:8]


def test_legacy_hash_of_a_small_file_is_that_of_nothing(
    tmp_path: Path, everywhere: Everywhere, short_sd: Factory
) -> None:
    path = save_adapter(everywhere(short_sd(), components=("text_encoder",)), tmp_path / "a.safetensors")
    assert read_header(path).metadata["sshs_legacy_hash"] == "e3b0c442"


def test_metadata_says_what_other_tools_look_for(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    adapter = everywhere(short_sd())
    adapter = Adapter(
        "x", "lora", adapter.changes, metadata={"ss_base_model_version": "sd_v1", "sshs_model_hash": "old"}
    )
    path = save_adapter(
        adapter, tmp_path / "dog.safetensors", metadata={"ss_seed": "7", "modelspec.title": "A dog"}
    )
    metadata = read_header(path).metadata
    wanted = {
        "format": "pt",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "2",
        "ss_output_name": "dog",
        "ss_seed": "7",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "A dog",
        "modelspec.date": "1970-01-02T00:00:00Z",
        "studio.format_version": "1",
    }
    assert metadata.items() >= wanted.items()
    assert metadata["sshs_model_hash"] != "old"


def test_equal_input_makes_equal_files(
    tmp_path: Path, short_sd: Factory, everywhere: Everywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    adapter = everywhere(short_sd())
    paths = [save_adapter(adapter, tmp_path / folder / "a.safetensors") for folder in ("one", "two")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(OutputError, match=r"SOURCE_DATE_EPOCH must be a number of seconds, got 'yesterday'"):
        save_adapter(adapter, tmp_path / "b.safetensors")


def _some() -> Adapter:
    change = KINDS["lora"].sample((32, 32), generator=torch.Generator().manual_seed(0))
    return Adapter("a", "lora", {f"unet.{LAYER}.weight": change})


def test_existing_file_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"a.safetensors exists. Choose another name or pass --overwrite"):
        save_adapter(_some(), path)
    assert path.read_text() == "precious"
    save_adapter(_some(), path, overwrite=True)
    assert load_adapter(path).changes


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    old = tmp_path / "a.safetensors"
    old.write_text("precious")
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device. Free some space"):
        save_adapter(_some(), old, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"] and old.read_text() == "precious"


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .*file is not a folder"):
        save_adapter(_some(), tmp_path / "file" / "a.safetensors")


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    path, some = tmp_path / "a.safetensors", _some()
    loud = LoraChange(torch.full((1, 32), 1e6), torch.ones(32, 1), 1.0)
    broken = LoraChange(torch.full((1, 32), float("nan")), torch.ones(32, 1), 1.0)
    name = next(iter(some.changes))
    calls: list[tuple[Adapter, dict[str, Any], type[Exception], str]] = [
        (Adapter("a", "lora", {}), {}, AdapterError, "changes nothing"),
        (
            Adapter("a", "lora", some.changes, tokens={"<dog>": {}}),
            {},
            AdapterError,
            "cannot hold the new tokens",
        ),
        (
            Adapter("a", "lora", {name: loud}),
            {},
            AdapterError,
            "exceeds the range of torch.float16.*bfloat16",
        ),
        (Adapter("a", "lora", {name: broken}), {}, AdapterError, "NaN or infinite values.*not written"),
        (Adapter("a", "lora", {"vae.a.weight": loud}), {}, AdapterError, "no place for 'vae.a'"),
        (some, {"metadata": {"ss_seed": 7}}, AdapterError, "metadata must be text, ss_seed is not"),
        (some, {"dtype": torch.float64}, UsageError, "float16, bfloat16 or float32, got torch.float64"),
        (some, {"format": "kohyaa"}, UsageError, "unknown adapter format 'kohyaa'. Did you mean 'kohya'?"),
    ]
    for adapter, options, error, words in calls:
        with pytest.raises(error, match=words):
            save_adapter(adapter, path, **options)
    with pytest.raises(
        OutputError, match=r"adapters are .safetensors files, got 'a.pt'. Name it 'a.safetensors'"
    ):
        save_adapter(some, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_an_sdxl_base_of_another_depth_reads_what_was_written_for_it(tmp_path: Path, short_sdxl: Any) -> None:
    """SGM's numbers depend on the layers per block, of which SDXL has two."""
    from studio.adapters.parameters import canonical_names, components_of

    pipe = short_sdxl()
    with torch.device("meta"):
        pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "layers_per_block": 3})
    generator = torch.Generator().manual_seed(0)
    shapes = canonical_names(components_of(pipe))
    changes = {
        name: LoraChange.sample(shape, generator=generator)
        for name, shape in shapes.items()
        if name.endswith("to_q.weight")
    }
    adapter, path = Adapter("deep", "lora", changes), tmp_path / "deep.safetensors"
    save_adapter(adapter, path, format="kohya", base=pipe)
    assert load_adapter(path, base=pipe).changes.keys() == changes.keys()
