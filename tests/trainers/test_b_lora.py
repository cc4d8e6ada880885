import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import studio
from studio.adapters.formats.kohya import Kohya
from studio.adapters.parameters import canonical_names
from studio.errors import OutputError, SpecError, TrainingError, UsageError
from studio.inspection import describe
from studio.models.fingerprint import fingerprint
from studio.specs import TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.methods.b_lora import BLora, BLoraOptions, roles_of
from studio.trainers.outputs import part_paths
from studio.trainers.targets import target_layers

CONTENT, STYLE = "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"


@pytest.fixture(scope="module")
def base(tiny_sdxl: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny-xl"
    tiny_sdxl().save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Return a folder with one picture, wider than high."""
    folder = tmp_path / "one"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


def spec_of(data: Path, output: Path, **values: Any) -> TrainSpec:
    given = {"method": "b-lora", "data": data, "output": output, "prompt": "A [v]", "steps": 3}
    given |= {"batch_size": 1, "rank": 4, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
    return parse_spec(TrainSpec, given | values)


@pytest.fixture
def trained(base: str, picture: Path, tmp_path: Path) -> studio.TrainResult:
    return studio.train(spec_of(picture, tmp_path / "vase.safetensors", base=base, format="kohya"))


def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_on_sdxl_each_block_has_80_layers_and_14_09_million_parameters_under_kohyas_names(
    full_size_unet: Callable[[str], nn.Module],
) -> None:
    pipe: Any = SimpleNamespace(unet=full_size_unet("sdxl"))
    options = BLoraOptions()
    roles = roles_of(pipe, options)
    assert roles == {"content": [CONTENT], "style": [STYLE]}
    table = Kohya().table(list(canonical_names({"unet": pipe.unet})))
    spelled = {module: key for key, module in table.items()}
    for number, role in enumerate(("content", "style")):
        layers = target_layers(pipe, targets="attention", exclude=(), text_encoders=False, blocks=roles[role])
        found = layers["unet"]
        assert len(found) == 80 and all(type(layer) is nn.Linear for layer in found.values())
        assert {name.split(".", 6)[-1] for name in found} == {
            f"{attention}.{projection}"
            for attention in ("attn1", "attn2")
            for projection in ("to_q", "to_k", "to_v", "to_out.0")
        }
        weights = [layer.weight.shape for layer in found.values()]  # type: ignore[union-attr]
        assert round(sum(options.rank * sum(shape) for shape in weights) / 1e6, 2) == 14.09
        keys = {spelled[f"unet.{name}"] for name in found}
        assert (
            all(key.startswith(f"lora_unet_output_blocks_{number}_1_transformer_blocks_") for key in keys)
            and len(keys) == 80
        )


def test_content_and_style_are_files_of_their_own_and_one_together(
    trained: studio.TrainResult, base: str, tmp_path: Path
) -> None:
    assert {word: path.name for word, path in trained.parts.items()} == {
        "content": "vase-content.safetensors",
        "style": "vase-style.safetensors",
    }
    whole, content, style = (tensors(path) for path in (trained.path, *trained.parts.values()))
    # 8 projections, each with down, up and alpha.
    assert len(content) == len(style) == 8 * 3
    assert all(key.startswith("lora_unet_output_blocks_0_1_") for key in content)
    assert all(key.startswith("lora_unet_output_blocks_1_1_") for key in style)
    assert whole.keys() == content.keys() | style.keys()
    assert all(torch.equal(whole[key], value) for key, value in {**content, **style}.items())
    assert all(bool(value.any()) for value in whole.values())

    pipe = studio.load_base(base, device="cpu")
    for word, path in trained.parts.items():
        found = metadata(path)
        block = {"content": CONTENT, "style": STYLE}[word]
        assert found["studio.role"] == word and json.loads(found["studio.roles"]) == {word: [block]}
        assert found["modelspec.trigger_phrase"] == "A [v]" and found["studio.base"] == fingerprint(pipe)
        assert found["ss_output_name"] == found["modelspec.title"] == path.stem
        assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["ss_network_dim"] == "4"
        assert f"  studio.role              {word}" in describe(path)
    assert "studio.role" not in metadata(trained.path)
    assert json.loads(metadata(trained.path)["studio.roles"]) == {"content": [CONTENT], "style": [STYLE]}


def test_the_parts_are_files_that_diffusers_loads(
    trained: studio.TrainResult, tiny_sdxl: Callable[[], Any]
) -> None:
    pipe = tiny_sdxl()
    pipe.load_lora_weights(str(trained.parts["style"]))
    from peft.tuners.lora import LoraLayer

    loaded = [name for name, layer in pipe.unet.named_modules() if isinstance(layer, LoraLayer)]
    assert len(loaded) == 8 and all(name.startswith(f"{STYLE}.") for name in loaded)


def weights_of(pipe: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in pipe.unet.named_parameters()}


def product(file: dict[str, Tensor], number: int, layer: str) -> Tensor:
    """Return what a file adds to one layer, computed in fp64 from its tensors alone."""
    key = f"lora_unet_output_blocks_{number}_1_{layer.replace('.', '_')}"
    up, down = file[f"{key}.lora_up.weight"].double(), file[f"{key}.lora_down.weight"].double()
    return float(file[f"{key}.alpha"]) / len(down) * up @ down


LAYER = "transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("weight", [1.0, 0.5, 1.1, -1.0, 2.0])
def test_strengths_are_linear(trained: studio.TrainResult, base: str, weight: float) -> None:
    pipe = studio.load_base(base, device="cpu")
    plain = weights_of(pipe)[f"{CONTENT}.{LAYER}.weight"]
    content = studio.load_adapter(trained.parts["content"], base=pipe)
    with studio.compose(pipe, {"content": content}, weights={"content": weight}):
        composed = weights_of(pipe)[f"{CONTENT}.{LAYER}.weight"]
    expected = weight * product(tensors(trained.parts["content"]), 0, LAYER)
    assert float(expected.abs().max()) > 1e-4
    # One rounding of the sum to fp32.
    assert torch.allclose(composed.double() - plain.double(), expected, atol=1e-7, rtol=0)


def test_the_content_of_one_picture_goes_with_the_style_of_another(
    trained: studio.TrainResult, base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    Image.new("RGB", (64, 64), "orange").save(folder / "b.png")
    other = studio.train(spec_of(folder, tmp_path / "fire.safetensors", base=base, seed=1, alpha=2.0))
    pipe = studio.load_base(base, device="cpu")
    plain = weights_of(pipe)
    files = {"vase": trained.parts["content"], "fire": other.parts["style"]}
    adapters = {name: studio.load_adapter(path, base=pipe) for name, path in files.items()}
    assert not set(adapters["vase"].changes) & set(adapters["fire"].changes)
    with studio.compose(pipe, adapters, weights={"vase": 0.8, "fire": 1.2}):
        composed = weights_of(pipe)
    for number, block, name, weight in ((0, CONTENT, "vase", 0.8), (1, STYLE, "fire", 1.2)):
        key = f"{block}.{LAYER}.weight"
        expected = weight * product(tensors(files[name]), number, LAYER)
        change = composed[key].double() - plain[key].double()
        assert torch.allclose(change, expected, atol=1e-7, rtol=0), name  # one rounding of the sum to fp32
    changed = {name for name in plain if not torch.equal(plain[name], composed[name])}
    assert changed == {
        f"{block}.transformer_blocks.0.{attention}.{projection}.weight"
        for block in (CONTENT, STYLE)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert all(torch.equal(plain[name], value) for name, value in weights_of(pipe).items())


def test_gradients_reach_the_two_blocks_alone(tiny_sdxl: Callable[[], Any], tmp_path: Path) -> None:
    pipe, trainer = tiny_sdxl(), BLora()
    groups = trainer.prepare(pipe, spec_of(tmp_path, tmp_path / "x.safetensors"))
    conditions = {"text_embeds": torch.randn(1, 32), "time_ids": torch.full((1, 6), 64.0)}
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 64)
    pipe.unet(latents, 5, states, added_cond_kwargs=conditions).sample.square().mean().backward()
    reached = {name for name, parameter in pipe.unet.named_parameters() if parameter.grad is not None}
    assert len(reached) == 2 * 8 * 2 == sum(len(group.parameters) for group in groups)
    assert all(name.startswith((f"{CONTENT}.", f"{STYLE}.")) and ".lora_" in name for name in reached)
    trainer.release()


def test_a_picture_that_is_not_square_is_trained_in_its_shape_with_the_right_size_conditions(
    tiny_sdxl: Callable[[], Any], picture: Path, tmp_path: Path
) -> None:
    pipe = tiny_sdxl()
    seen: list[tuple[tuple[int, ...], list[float]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((tuple(args[0].shape[-2:]), kwargs["added_cond_kwargs"]["time_ids"][0].tolist()))

    pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    train(pipe, spec_of(picture, tmp_path / "x.safetensors", steps=1, bucket_step=8, bucket_min=8))
    # 130 x 60 px fit 88 x 40 px best of all sizes of at most 64 x 64 px; 130 x 59 of them are used, from the
    # top line on as half a line is cut from either side.
    ((latents, conditions),) = seen
    assert latents == (40 // pipe.vae_scale_factor, 88 // pipe.vae_scale_factor)
    assert conditions == [60, 130, 0, 0, 40, 88]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {},
            TrainingError,
            r"b-lora knows the blocks of SDXL, the base is sd1, which lacks up_blocks\.0\.attentions\.0 and "
            r"up_blocks\.0\.attentions\.1\. Choose an SDXL base, or name blocks with content_blocks and "
            r"style_blocks .*'studio probe'.*The base has down_blocks\.0\.attentions\.0,",
        ),
        (
            {"content_blocks": ("up_blocks.1",), "style_blocks": ("up_blocks.1.attentions.1",)},
            TrainingError,
            r"up_blocks\.1\.attentions\.1 would learn both content and style\. Give each block one role",
        ),
        (
            {"content_blocks": ("up_blocks.0",), "style_blocks": ("up_blocks.1",)},
            UsageError,
            r"content_blocks: the base has no attention block 'up_blocks\.0'\. Did you mean 'up_blocks",
        ),
    ],
    ids=["no-blocks", "both-roles", "unknown-block"],
)
def test_a_base_that_does_not_fit_is_one_message(
    tiny_sd: Callable[[], Any],
    picture: Path,
    tmp_path: Path,
    values: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        train(tiny_sd(), spec_of(picture, tmp_path / "x.safetensors", **values))


def test_sdxl_without_the_papers_blocks_is_refused_too(full_size_unet: Callable[[str], nn.Module]) -> None:
    pipe: Any = SimpleNamespace(unet=full_size_unet("sdxl"))
    del pipe.unet.up_blocks[0].attentions[1:]
    with pytest.raises(TrainingError, match=r"the base is sdxl, which lacks up_blocks\.0\.attentions\.1\."):
        roles_of(pipe, BLoraOptions())


@pytest.mark.parametrize("given", ["content_blocks", "style_blocks"])
def test_one_role_alone_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="style_blocks: content_blocks and style_blocks are given together"):
        spec_of(tmp_path, tmp_path / "x.safetensors", **{given: ("mid_block",)})


def test_text_encoders_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="train_text_encoder: content and style are learned by blocks of the"):
        spec_of(tmp_path, tmp_path / "x.safetensors", train_text_encoder=True)


def test_on_sd1_named_blocks_are_trained_and_the_report_calls_it_an_experiment(
    tiny_sd: Callable[[], Any], folder: Path, tmp_path: Path
) -> None:
    reports: list[str] = []
    spec = spec_of(
        folder,
        tmp_path / "x.safetensors",
        content_blocks=("mid_block", "up_blocks.1.attentions.0"),
        style_blocks=("up_blocks.1.attentions.1",),
        learning_rate=None,
    )
    adapter = train(tiny_sd(), spec, on_event=lambda event: reports.append(event.message))
    text = reports[0]
    assert "Warning: b-lora is made for one picture, got 4" in text
    assert "Warning: on bases other than SDXL b-lora is an experiment" in text
    assert "learning rate 5e-05" in text
    content, style = (BLora.part(adapter, word) for word in ("content", "style"))
    assert {name.split(".transformer")[0] for name in content.changes} == {
        "unet.mid_block.attentions.0",
        "unet.up_blocks.1.attentions.0",
    }
    assert {name.split(".transformer")[0] for name in style.changes} == {"unet.up_blocks.1.attentions.1"}
    assert content.changes.keys() | style.changes.keys() == adapter.changes.keys()


def test_one_picture_on_sdxl_is_what_it_is_made_for(
    tiny_sdxl: Callable[[], Any], picture: Path, tmp_path: Path
) -> None:
    reports: list[str] = []
    spec = spec_of(picture, tmp_path / "x.safetensors", steps=1)
    train(tiny_sdxl(), spec, on_event=lambda event: reports.append(event.message))
    assert "b-lora is made for one picture" not in reports[0] and "experiment" not in reports[0]


def test_files_of_the_parts_are_checked_before_the_work(base: str, picture: Path, tmp_path: Path) -> None:
    spec = spec_of(picture, tmp_path / "x.safetensors", base=base, steps=10**6)
    (tmp_path / "x-style.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"x-style\.safetensors' exists"):
        studio.train(spec)
    assert [path.name for path in tmp_path.glob("x*")] == ["x-style.safetensors"]


def test_adapters_on_the_way_have_their_parts_too(
    tiny_sdxl: Callable[[], Any], picture: Path, tmp_path: Path
) -> None:
    spec = spec_of(picture, tmp_path / "x.safetensors", save_every=1, steps=2)
    saved: dict[str, Path] = {}
    train(
        tiny_sdxl(), spec, on_event=lambda event: saved.update({event.part: event.path} if event.path else {})
    )
    stem = "x-step-000001"
    assert {part: path.name for part, path in saved.items()} == {
        "": f"{stem}.safetensors",
        "content": f"{stem}-content.safetensors",
        "style": f"{stem}-style.safetensors",
    }
    assert all(path.is_file() for path in saved.values())
    assert part_paths(saved[""], spec)["style"] == saved["style"]
    assert not BLora.companions, "its own file holds both roles"
