"""ZipLoRA: weights for columns against dense matrices, and `studio zip` from files to a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import studio
from studio import cli
from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.merge import merge_adapters
from studio.adapters.parameters import components_of
from studio.bases import cached_base
from studio.composition.engine import compose
from studio.errors import AdapterError, OutputError, TrainingError
from studio.merging.columns import Columns
from studio.registry import MERGERS
from studio.specs import Event, ZipSpec

Make = Callable[..., Adapter]
SHARED = ("unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2")
CONTENT = (
    *SHARED,
    "unet.down_blocks.0.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn",
)
STYLE = (*SHARED, "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v")
WEIGHTS = {"content": 0.8, "style": 1.1}


@pytest.fixture(scope="module")
def pipe(short_sd: Callable[[], Any]) -> Any:
    return short_sd()


@pytest.fixture(scope="module")
def pair(pipe: Any, everywhere: Make) -> dict[str, Adapter]:
    return {
        "content": everywhere(pipe, seed=1, components=CONTENT),
        "style": everywhere(pipe, seed=2, components=STYLE),
    }


@pytest.fixture(scope="module")
def base(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "short"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def asked(pipe: Any, pair: dict[str, Adapter], base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function: values of a specification -> the specification, for two files and a folder."""
    folder = tmp_path_factory.mktemp("zip")
    for side, adapter in pair.items():
        save_adapter(adapter, folder / f"{side}.safetensors", format="kohya", dtype=torch.float32, base=pipe)
    for side, colour in (("content", "red"), ("style", "blue")):
        (folder / side).mkdir()
        Image.new("RGB", (64, 64), colour).save(folder / side / "one.png")

    def specification(**values: Any) -> ZipSpec:
        given = {f"{side}_data": folder / side for side in pair}
        given |= {side: f"{folder / side}.safetensors:{WEIGHTS[side]}" for side in pair}
        given |= {"content_prompt": "a dog", "style_prompt": "ink", "base": base, "steps": 2}
        return ZipSpec(**given | values)

    return specification


def columns_of(pipe: Any, pair: dict[str, Adapter]) -> Columns:
    return Columns(components_of(pipe), pair, WEIGHTS)


def test_pictures_are_encoded_in_fp32_whatever_the_base_is_held_in(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    seen = []
    encode = AutoencoderKL.encode

    def noted(vae: Any, pixels: torch.Tensor) -> Any:
        seen.append((vae.dtype, pixels.dtype))
        return encode(vae, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", noted)
    spec = asked(output=tmp_path / "zipped.safetensors", precision="bf16", steps=1)
    studio.zip_adapters(spec)
    assert seen == [(torch.float32, torch.float32)] * 2
    assert cached_base(spec.base, spec.device, "bf16").vae.dtype == torch.bfloat16


def test_columns_that_weigh_one_are_the_concatenation_exactly(pipe: Any, pair: dict[str, Adapter]) -> None:
    changes = columns_of(pipe, pair).changes()
    joined = merge_adapters(pair, WEIGHTS, MERGERS["linear"]()).adapter.changes
    assert changes.keys() == {name for name in joined if name.startswith("unet.")}
    for name, change in changes.items():
        for part in ("down", "up"):
            assert torch.equal(getattr(change, part), getattr(joined[name], part)), name
        assert change.alpha == joined[name].alpha == change.rank


def test_gradients_are_those_of_the_dense_sum(short_sd: Any, pair: dict[str, Adapter]) -> None:
    pipe = short_sd()
    unet = pipe.unet.double()
    columns = columns_of(pipe, pair)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in columns.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=generator).double(),
        torch.tensor([300, 300]),
        torch.randn(2, 77, 32, generator=generator).double(),
    )
    pull = torch.randn(2, 4, 8, 8, generator=generator).double()

    with columns.acting("content", "style", zipped=True):
        answer = unet(*inputs, return_dict=False)[0]
        (answer * pull).sum().backward()

    # The oracle forms every layer's weight: W + dW_c diag(m_c) + dW_s diag(m_s).
    leaves: dict[tuple[str, str], torch.Tensor] = {}
    weights = {}
    for name, layer in columns.layers.items():
        weight = layer.parameter.detach().clone()
        for side, part in layer.parts.items():
            change = pair[side].changes[name]
            up, down = change.up.double().flatten(1), change.down.double().flatten(1)
            delta = (WEIGHTS[side] * change.alpha / change.rank * up @ down).reshape(weight.shape)
            leaf = leaves[name, side] = part.columns.detach().double().requires_grad_()
            weight = weight + delta * leaf.view(1, -1, *(1 for _ in weight.shape[2:]))
        weights[name.removeprefix("unet.")] = weight
    dense = torch.func.functional_call(unet, weights, inputs, {"return_dict": False})[0]
    torch.testing.assert_close(answer, dense, rtol=1e-5, atol=1e-5)  # factors are kept in fp32
    (dense * pull).sum().backward()
    assert len(leaves) == len(columns.parameters)
    for (name, side), leaf in leaves.items():
        got = columns.layers[name].parts[side].columns.grad
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-4, atol=1e-4 * scale)  # as above
        assert scale > 0
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_one_adapter_alone_answers_as_if_composed(pipe: Any, pair: dict[str, Adapter]) -> None:
    inputs = torch.randn(1, 4, 8, 8), 300, torch.randn(1, 77, 32)
    with torch.no_grad():
        with columns_of(pipe, pair).acting("style", zipped=False):
            got = pipe.unet(*inputs, return_dict=False)[0]
        plain = pipe.unet(*inputs, return_dict=False)[0]
        pipe.scheduler.set_timesteps(1)
        with compose(pipe, {"style": pair["style"]}, weights={"style": WEIGHTS["style"]}):
            wanted = pipe.unet(*inputs, return_dict=False)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # beside the weights, not in them
    assert float((got - plain).abs().max()) > 1e-2


def test_the_overlap_is_the_mean_of_the_shared_columns(pipe: Any, pair: dict[str, Adapter]) -> None:
    columns = columns_of(pipe, pair)
    shared = [layer for layer in columns.layers.values() if len(layer.parts) == 2]
    assert 1 < len(shared) < len(columns.layers)
    assert columns.overlap() == 1 and float(columns.penalty().detach()) == len(shared)
    with torch.no_grad():
        shared[0].parts["content"].columns[:] = torch.linspace(-1, 1, 32)
    wanted = torch.linspace(-1, 1, 32).abs().mean() + len(shared) - 1
    torch.testing.assert_close(columns.penalty().detach(), wanted)


def test_learnt_columns_lower_the_loss_and_the_run_repeats(asked: Any, tmp_path: Path) -> None:
    def run(name: str, **values: Any) -> Any:
        return studio.zip_adapters(asked(output=tmp_path / name, steps=8, penalty=0, **values))

    still = run("still.safetensors", learning_rate=1e-12)
    learnt, again = (run(f"{name}.safetensors", learning_rate=0.05) for name in ("learnt", "again"))
    # The same pictures, noise and timesteps at each step, so steps are compared one by one.
    assert learnt.losses[0] == still.losses[0]
    assert sum(learnt.losses[4:]) < 0.9 * sum(still.losses[4:])
    assert learnt.losses == again.losses
    assert all(
        torch.equal(change.down, again.adapter.changes[name].down)
        for name, change in learnt.adapter.changes.items()
    )
    moved = [
        float((change.down - still.adapter.changes[name].down).abs().max())
        for name, change in learnt.adapter.changes.items()
        if name.startswith("unet.")
    ]
    assert min(moved) > 1e-3


def test_each_setting_changes_what_it_names(asked: Any, tmp_path: Path) -> None:
    def run(**values: Any) -> Any:
        return studio.zip_adapters(asked(output=tmp_path / "zipped.safetensors", overwrite=True, **values))

    plain, apart = run(), run(penalty=50.0)
    assert apart.overlap < plain.overlap and apart.losses[0] > plain.losses[0] + 10
    assert run(seed=1).losses != plain.losses
    assert run(style_prompt="fog").losses != plain.losses
    assert run(resolution=32).losses != plain.losses
    assert run(gradient_checkpointing=True).losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_file_draws_in_diffusers_as_here(
    asked: Any, pipe: Any, short_sd: Any, tmp_path: Path, pair: dict[str, Adapter]
) -> None:
    from safetensors.torch import load_file

    output = tmp_path / "zipped.safetensors"
    result = studio.zip_adapters(asked(output=output, format="diffusers"))
    assert not any("diff" in key for key in load_file(output))
    adapter = load_adapter(output, base=pipe)
    assert adapter.changes.keys() == pair["content"].changes.keys() | pair["style"].changes.keys()
    inputs = torch.randn(1, 4, 8, 8), 300, torch.randn(1, 77, 32)
    other = short_sd()
    other.load_lora_weights(output)
    pipe.scheduler.set_timesteps(1)
    with torch.no_grad(), compose(pipe, {"both": result.adapter}):
        wanted = pipe.unet(*inputs, return_dict=False)[0]
        spoken = pipe.encode_prompt("ink", "cpu", 1, False)[0]
    with torch.no_grad():
        got, heard = other.unet(*inputs, return_dict=False)[0], other.encode_prompt("ink", "cpu", 1, False)[0]
    torch.testing.assert_close(got, wanted, rtol=5e-3, atol=5e-3)  # the file holds fp16
    torch.testing.assert_close(heard, spoken, rtol=5e-3, atol=5e-3)  # as above
    recipe = json.loads(read_header(output).metadata["studio.zip"])
    assert recipe["content_prompt"] == "a dog" and recipe["steps"] == 2
    assert [each["weight"] for each in recipe["adapters"]] == [0.8, 1.1]


def test_without_folders_the_adapters_draw_and_a_stopped_run_is_saved(
    asked: Any, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    spec = asked(
        output=tmp_path / "a.safetensors",
        **{"content_data": None, "style_data": None, "pictures": 1, "sample_steps": 1, "steps": 9},
    )

    def stop() -> bool:
        return any(event.total == 9 and event.step == 2 for event in events)

    result = studio.zip_adapters(spec, on_event=events.append, stop=stop)
    assert result.stopped and len(result.losses) == 2
    assert load_adapter(spec.output, base=studio.load_base(base)).changes
    assert [event.message for event in events[:2]] == ["drawing the content", "drawing the style"]
    with pytest.raises(TrainingError, match="stopped before the first step"):
        studio.zip_adapters(spec.model_copy(update={"overwrite": True}), stop=lambda: True)
    with pytest.raises(OutputError, match="exists"):
        studio.zip_adapters(spec)


def test_the_command_writes_the_file(asked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = asked(output=tmp_path / "both.safetensors", steps=1)
    words = ["zip", f"{spec.content.path}:0.8", str(spec.style.path), "--output", str(spec.output)]
    words += ["--content-prompt", "a dog", "--style-prompt", "ink", "--base", spec.base, "--steps", "1"]
    words += ["--content-data", str(spec.content_data), "--style-data", str(spec.style_data)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert f"{spec.output}: 1 of 1 steps" in printed and "overlap 0.98 (1 at first)" in printed


def test_changes_without_a_rank_are_refused(pipe: Any, everywhere: Make, pair: dict[str, Adapter]) -> None:
    dense = {**pair, "style": everywhere(pipe, kind="full", components=SHARED)}
    with pytest.raises(AdapterError, match=r"'style' changes .* `studio convert --rank"):
        columns_of(pipe, dense)
