"""Finding and loading base models."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.errors import BaseModelError, UsageError
from studio.models.base import architecture, bars_off, find_base, fingerprint, load_base, starter_path
from studio.models.device import resolve_device, resolve_dtype


@pytest.fixture(scope="module")
def folders(tiny_sd: Any, tiny_sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return diffusers folders by family."""
    root = tmp_path_factory.mktemp("bases")
    tiny_sd().save_pretrained(root / "dogs-v1")
    tiny_sdxl().save_pretrained(root / "dogs-xl")
    return {"sd": root / "dogs-v1", "sdxl": root / "dogs-xl"}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Return a folder of SD 1.x to spoil."""
    return Path(shutil.copytree(folders["sd"], tmp_path / "copy"))


@pytest.mark.parametrize(("family", "name"), [("sd", "sd1"), ("sdxl", "sdxl")])
def test_a_diffusers_folder_loads_as_an_ordinary_pipeline(
    family: str,
    name: str,
    folders: dict[str, Path],
    tiny_sd: Any,
    tiny_sdxl: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = {"sd": tiny_sd, "sdxl": tiny_sdxl}[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load_base(folders[family])
    assert type(pipe) is type(original)
    assert architecture(pipe) == name
    assert pipe.unet.dtype == torch.float32 and pipe.device.type in ("cpu", "cuda", "mps")
    for component in ("unet", "vae", "text_encoder"):
        loaded, wanted = (getattr(each, component).state_dict() for each in (pipe, original))
        assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    pipe("a fox", num_inference_steps=1, output_type="latent")
    said = capfd.readouterr()
    assert "it/s" not in said.err and "%|" not in said.err
    assert "safety" not in said.err.lower() + caplog.text.lower()


def test_precision_is_what_was_asked(folders: dict[str, Path]) -> None:
    pipe = load_base(folders["sd"], precision="bf16", device="cpu")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_named_by_variant_are_found(copy: Path, precision: str) -> None:
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (copy / part / f"{stem}.safetensors").rename(copy / part / f"{stem}.fp16.safetensors")
    assert architecture(load_base(copy, device="cpu", precision=precision)) == "sd1"


def test_loading_leaves_the_libraries_progress_bars_as_they_were(folders: dict[str, Path]) -> None:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    load_base(folders["sd"])
    with bars_off():
        assert not are_progress_bars_disabled(), "downloads take long"
    assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()


def test_the_starter_lies_in_the_installed_package() -> None:
    if not (starter := Path(_assets()) / "starter" / "model_index.json").is_file():
        with pytest.raises(BaseModelError, match="lacks the embedded base model 'starter'"):
            load_base("starter")
        return
    assert starter_path() == starter.parent
    assert architecture(load_base("starter")) == "sd1"


def _assets() -> str:
    import studio.assets

    return str(studio.assets.__path__[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("startr", "'startr' does not exist. Did you mean 'starter'"),
        ("{root}/dogs-v2", "Did you mean '{root}/dogs-v1'"),
        ("{root}/dogs.safetensors", "does not exist"),
        ("{root}/x.ckpt", "is a pickle, which can run code .* Only .safetensors is read"),
        ("{root}/x.bin", "is a pickle"),
        ("{root}", "has no model_index.json, so it is not a diffusers folder. Did you mean '{root}/dogs-v1'"),
        ("{root}/dogs-v1/unet", "has no model_index.json.* Did you mean '{root}/dogs-v1'"),
        ("{root}/dogs-v1/model_index.json", "is not a base model. Give 'starter', a diffusers folder"),
        ("{root}/dogs-v1/unet/diffusion_pytorch_model.safetensors", "no complete base model"),
    ],
)
def test_what_is_no_base_is_refused_with_the_way_out(
    given: str, message: str, folders: dict[str, Path]
) -> None:
    root = str(folders["sd"].parent)
    with pytest.raises(BaseModelError, match=message.format(root=root)):
        load_base(given.format(root=root))


def test_a_hub_id_is_told_from_a_path(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_base("someone/some-model.v1") == "someone/some-model.v1"
    monkeypatch.chdir(folders["sd"].parent.parent)
    relative = f"{folders['sd'].parent.name}/dogs-v1"
    assert find_base(relative) == Path(relative)
    with pytest.raises(BaseModelError, match="Did you mean"):
        find_base(relative.replace("v1", "v2"))


def test_a_hub_id_without_network_names_the_way_out() -> None:
    with pytest.raises(
        BaseModelError, match=r"'someone/never-fetched' .* without a network only models fetched before"
    ):
        load_base("someone/never-fetched")


def rewrite(index: Path, **changes: Any) -> None:
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").write_text("{"), "not readable as JSON"),
        (
            lambda folder: rewrite(folder / "model_index.json", _class_name="FluxPipeline"),
            "holds a FluxPipeline, wanted",
        ),
        (
            lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "vae holds no weights",
        ),
        (
            lambda folder: (folder / "text_encoder" / "model.safetensors").rename(
                folder / "text_encoder" / "model.bin"
            ),
            "text_encoder holds only model.bin, a pickle",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64),
            "cannot be loaded .*Get its files again",
        ),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks its part 'tokenizer'"),
    ],
    ids=["json", "class", "missing", "pickle", "broken", "tokenizer"],
)
def test_a_spoilt_folder_is_refused(spoil: Callable[[Path], Any], message: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(BaseModelError, match=message):
        load_base(copy)


def test_a_broken_single_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(BaseModelError, match="not a readable safetensors file"):
        load_base(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"device: .*'{name}'"):
        resolve_device(name)


def test_precision_follows_the_device() -> None:
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    assert resolve_dtype("bf16", "cuda") == torch.bfloat16
    with pytest.raises(UsageError, match="precision: unknown 'fp8'"):
        resolve_dtype("fp8")


def test_a_pipeline_of_another_kind_has_no_known_architecture(tiny_sd: Any) -> None:
    pipe = tiny_sd()
    pipe.unet = None
    with pytest.raises(BaseModelError, match=r"has no UNet of SD 1.x"):
        architecture(pipe)


@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "sd2"), ("v_prediction", "sd2-v")])
def test_the_width_of_the_text_features_tells_sd2(prediction: str, name: str, tiny_sd: Any) -> None:
    pipe = tiny_sd()
    pipe.scheduler = type(pipe.scheduler)(prediction_type=prediction)
    assert architecture(pipe) == "sd1"
    pipe.unet.register_to_config(cross_attention_dim=1024)
    assert architecture(pipe) == name


def test_the_fingerprint_knows_the_weights_again(folders: dict[str, Path], tiny_sd: Any) -> None:
    pipe = tiny_sd()
    first = fingerprint(pipe)
    assert len(first) == 64
    assert fingerprint(load_base(folders["sd"])) == first
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1
    assert fingerprint(pipe) != first


def test_the_fingerprint_sees_the_configuration(tiny_sd: Any) -> None:
    pipe = tiny_sd()
    first = fingerprint(pipe)
    pipe.unet.register_to_config(sample_size=16)
    assert fingerprint(pipe) != first


LDM_MODULES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm_unet_name(name: str) -> str:
    """Return the checkpoint's name of a UNet parameter of SD 1.x's layout with two layers per block."""
    module, _, leaf = name.rpartition(".")
    if module in LDM_MODULES:
        return f"{LDM_MODULES[module]}.{leaf}"
    parts = module.split(".")
    if parts[0] == "mid_block":
        place = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}"
        rest = parts[3:]
    else:
        block, kind, item, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{3 * (block + 1)}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv.{leaf}"
        number = 1 + 3 * block + item if parts[0] == "down_blocks" else 3 * block + item
        row = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        place = f"{row}.{number}.{0 if kind == 'resnets' else 1}"
    if rest[0] in LDM_RESNET:
        rest = [LDM_RESNET[rest[0]]]
    return ".".join([place, *rest, leaf])


def ldm_vae_name(name: str) -> str:
    """Return the checkpoint's name of an autoencoder parameter with four levels and one layer per block."""
    for new, old in {
        "conv_norm_out": "norm_out",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_shortcut": "nin_shortcut",
        "resnets": "block",
        "down_blocks": "down",
    }.items():
        name = name.replace(new, old)
    parts = name.split(".")
    if parts[1] == "up_blocks":
        parts[1:3] = ["up", str(3 - int(parts[2]))]
    return ".".join(parts)


def single_file(folder: Path, target: Path) -> Path:
    """Write a diffusers folder as one checkpoint in the naming of the first Stable Diffusion."""
    tensors = {}
    for key, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors[f"model.diffusion_model.{ldm_unet_name(key)}"] = value
    for key, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        tensors[f"first_stage_model.{ldm_vae_name(key)}"] = value
    for key, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        path = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{path}"] = value
    save_file(tensors, target)
    return target


def test_a_single_file_loads_with_the_configuration_beside_it(
    folders: dict[str, Path], tmp_path: Path, tiny_sd: Any
) -> None:
    checkpoint = single_file(folders["sd"], tmp_path / "dogs.safetensors")
    shutil.copytree(folders["sd"], tmp_path / "dogs.config", ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = load_base(checkpoint)
    original = tiny_sd()
    assert fingerprint(pipe) == fingerprint(original)
    for component in ("vae", "text_encoder"):
        loaded, wanted = (getattr(each, component).state_dict() for each in (pipe, original))
        assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert pipe.safety_checker is None


def test_a_single_file_without_configuration_names_the_way_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = single_file(folders["sd"], tmp_path / "dogs.safetensors")
    with pytest.raises(
        BaseModelError, match=r"fetched from the hub once, or read from a folder 'dogs.config' beside it"
    ):
        load_base(checkpoint)
