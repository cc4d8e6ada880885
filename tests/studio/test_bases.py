"""What a request says of how its base computes reaches the base, which is kept for the next as it was."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio import api, bases
from studio.errors import TrainingError, UsageError
from studio.models import execution
from studio.models.quantization import quantization_of
from studio.png import Facts, infotext, read_spec
from studio.specs import GenerateSpec, TrainSpec, parse_spec
from studio.specs.events import silent
from studio.trainers.processes import ALONE


@pytest.fixture(scope="module")
def base(short_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a short SD 1.x base model."""
    folder = tmp_path_factory.mktemp("base") / "short"
    short_sd().save_pretrained(folder)
    return str(folder)


def draw(base: str, output: Path, **values: Any) -> "np.ndarray[Any, np.dtype[np.int16]]":
    given = {"base": base, "prompt": "a disc", "steps": 2, "output": output, "overwrite": True, **values}
    (result,) = api.generate(parse_spec(GenerateSpec, given))
    return np.asarray(result.image).astype(np.int16)


def test_the_last_base_is_gone_before_another_is_loaded(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = bases.cached_base(base, "cpu", "fp32")
    # As what a run left behind may hold it.
    pipe.itself = pipe  # type: ignore[attr-defined]
    before, load = weakref.ref(pipe), bases.load_base
    del pipe

    def loads(*args: Any, **values: Any) -> Any:
        assert before() is None
        return load(*args, **values)

    monkeypatch.setattr(bases, "load_base", loads)
    gc.disable()
    try:
        assert bases.cached_base(base, "cpu", "bf16").unet.dtype == torch.bfloat16
    finally:
        gc.enable()


@pytest.mark.parametrize(("has_bf16", "best"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_trains_in_bf16_where_it_has_it(
    has_bf16: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.trainers.runtime.has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(bases, "resolve_device", torch.device)
    monkeypatch.setattr(bases, "cached_base", lambda base, device, precision, *_: precision)
    for device, asked, wanted in (
        ("cuda", "auto", best),
        ("cuda", "fp16", "fp16"),
        ("mps", "auto", "fp32"),
        ("cpu", "bf16", "fp32"),
    ):
        spec = parse_spec(
            TrainSpec, {"data": "d", "output": "x.safetensors", "device": device, "precision": asked}
        )
        assert bases.base_to_train(spec, ALONE, silent) == wanted


def test_attention_is_computed_as_a_request_asks(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    called: list[bool] = []
    compute = AttnProcessor.__call__

    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return compute(*args, **kwargs)

    monkeypatch.setattr(AttnProcessor, "__call__", noted)
    plain = draw(base, tmp_path)
    assert not called
    assert np.abs(draw(base, tmp_path, attention="eager") - plain).max() <= 1  # sums are ordered otherwise
    assert called
    called.clear()
    assert np.array_equal(draw(base, tmp_path), plain) and not called


def test_pictures_are_decoded_in_tiles_where_asked(base: str, tmp_path: Path) -> None:
    vae = bases.cached_base(base, "auto", "auto").vae
    # Larger than one tile of this autoencoder, whose own pictures are of 64 pixels.
    size = {"width": 128, "height": 128}
    plain, tiled = draw(base, tmp_path, **size), draw(base, tmp_path, **size, vae_tiling=True)
    assert plain.shape == tiled.shape and not np.array_equal(plain, tiled)
    assert not vae.use_tiling


def test_prompts_are_read_from_the_layer_asked_for(base: str, tmp_path: Path) -> None:
    plain, skipped = draw(base, tmp_path), draw(base, tmp_path, clip_skip=2)
    assert not np.array_equal(plain, skipped) and np.array_equal(draw(base, tmp_path), plain)
    spec = GenerateSpec(prompt="a disc", clip_skip=2)
    said = infotext(spec, Facts(width=64, height=64))
    assert ", Clip skip: 2, " in said
    assert "Clip skip" not in infotext(spec.model_copy(update={"clip_skip": 1}), Facts(width=64, height=64))


def test_a_request_is_drawn_by_compiled_blocks_where_asked(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise RuntimeError("reached")

    monkeypatch.setattr(execution, "BACKEND", backend)
    with pytest.raises(UsageError, match=r"compile: the UNet cannot be compiled here \(reached\)"):
        draw(base, tmp_path, compile=True)
    draw(base, tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"offload": "model"}, "offload: 'model' moves weights between a GPU and the CPU"),
        ({"attention": "xformers"}, "attention: xformers"),
        ({"quantize_base": "nf4"}, "quantize_base: 'nf4' needs bitsandbytes"),
    ],
    ids=["offload", "xformers", "quantize"],
)
def test_what_this_machine_cannot_do_is_said_before_the_base_is_loaded(
    tmp_path: Path, pictures: Path, values: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    monkeypatch.setattr("studio.models.quantization.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=said):
        draw("no/such-base", tmp_path, device="cpu", **values)
    if "offload" in values:
        return
    given = {"base": "no/such-base", "data": pictures, "prompt": "x", "device": "cpu"}
    with pytest.raises(UsageError, match=said):
        api.train(parse_spec(TrainSpec, {**given, "output": tmp_path / "x.safetensors", **values}))


def test_a_picture_says_what_changed_it_and_not_what_machine_drew_it(base: str, tmp_path: Path) -> None:
    draw(base, tmp_path, vae_tiling=True, attention="eager")
    spec = read_spec(next(tmp_path.glob("*.png")))
    assert (spec.vae_tiling, spec.attention) == (True, "auto")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_is_trained_and_drawn_with_on_a_quantised_base(
    base: str, pictures: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="it quantises")
    quantized = {"base": base, "quantize_base": kind, "device": "cpu"}
    output = tmp_path / "disc.safetensors"
    run = {"data": pictures, "output": output, "prompt": "a disc", "steps": 3, "learning_rate": 0.1}
    result = api.train(parse_spec(TrainSpec, {**quantized, **run, "rank": 4, "sample_every": 3}))
    samples = sorted((tmp_path / "disc-run").rglob("samples/*.png"))
    assert result.adapter.changes and len(samples) == 2
    assert quantization_of(bases.cached_base(base, "cpu", "fp32", kind).unet) == kind  # type: ignore[arg-type]
    size = {"width": 64, "height": 64}
    plain = draw(output=tmp_path, **quantized, **size)
    acting = draw(output=tmp_path, **quantized, **size, adapters=[f"{output}:1"])
    dense = draw(base, tmp_path, **size, adapters=[f"{output}:1"])
    assert not np.array_equal(plain, acting)
    assert np.array_equal(plain, draw(output=tmp_path, **quantized, **size))
    # The adapter acts on the quantised base much as on the plain one.
    assert np.abs(acting - dense).mean() < np.abs(acting - plain).mean()


def test_samples_that_could_not_be_drawn_are_refused_before_the_start(
    base: str, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="it quantises")
    given = {"base": base, "quantize_base": "nf4", "device": "cpu", "data": pictures, "prompt": "x"}
    run = {"output": tmp_path / "x.safetensors", "method": "oft", "steps": 2, "sample_every": 1}
    with pytest.raises(TrainingError, match="sample_every: no samples can be drawn on a quantised base"):
        api.train(parse_spec(TrainSpec, given | run))
