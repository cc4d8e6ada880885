"""How a base computes changes for the length of a block, and what cannot work here says what to do."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.errors import UsageError
from studio.generation import Settings, draw
from studio.models import execution
from studio.models.execution import (
    attention,
    check_attention,
    check_offload,
    compiled,
    offloaded,
    tiled,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Counting:
    """A backend of torch.compile that runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs += 1
        forward: Callable[..., Any] = graph.forward
        return forward


def predict(unet: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    words = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        predicted: torch.Tensor = unet(latents, 10 + seed, words).sample
    return predicted


def names(unet: Any) -> set[str]:
    return {type(processor).__name__ for processor in unet.attn_processors.values()}


def test_attention_is_computed_as_asked_within_the_block_and_as_before_after_it(
    short_sd: Callable[[], Any],
) -> None:
    unet = short_sd().unet
    before = unet.attn_processors
    plain = predict(unet)
    for kind, wanted in (("sdpa", "AttnProcessor2_0"), ("eager", "AttnProcessor"), ("auto", None)):
        with pytest.raises(KeyError), attention(unet, kind):  # type: ignore[arg-type]
            assert names(unet) == ({wanted} if wanted else names(unet))
            # The order of sums differs.
            assert torch.allclose(predict(unet), plain, atol=1e-5)
            raise KeyError
        assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(predict(unet), plain)


def test_xformers_says_how_to_get_it_or_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"pip install 'diffusion-studio\[xformers\]', or set attention to auto"
    ):
        check_attention("xformers", GPU)
    monkeypatch.setattr(execution, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="xformers needs a GPU, the device is 'cpu'"):
        check_attention("xformers", CPU)
    check_attention("eager", CPU)


def test_compiled_blocks_compute_the_same_bits_from_graphs_made_once(
    one_block_sd: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = one_block_sd().unet
    plain = [predict(unet, seed) for seed in range(4)]
    backend = Counting()
    monkeypatch.setattr(execution, "BACKEND", backend)
    found, graphs = [], []
    with pytest.raises(KeyError), compiled(unet):
        for seed in range(4):
            found.append(predict(unet, seed))
            graphs.append(backend.graphs)
        raise KeyError
    assert all(map(torch.equal, found, plain))
    assert graphs == [1, 1, 1, 1]
    assert not any("_compiled_call_impl" in vars(module) for module in unet.modules())
    assert torch.equal(predict(unet), plain[0]) and backend.graphs == 1
    with compiled(unet, False):
        assert not any("_compiled_call_impl" in vars(module) for module in unet.modules())


def test_a_machine_that_cannot_compile_is_told_what_is_missing(
    one_block_sd: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(execution, "BACKEND", broken)
    unet = one_block_sd().unet
    with (
        pytest.raises(UsageError, match=r"compile: .*\(no C\+\+ compiler\).*Triton.*leave compile out"),
        compiled(unet),
    ):
        predict(unet)


def test_offload_without_a_gpu_or_of_quantised_layers_one_by_one_is_refused() -> None:
    check_offload("none", CPU, quantized=True)
    check_offload("model", GPU, quantized=True)
    with pytest.raises(UsageError, match=r"the device is 'cpu'. Leave offload out, or give a GPU"):
        check_offload("model", CPU, quantized=False)
    with pytest.raises(UsageError, match="Use offload='model', or set quantize_base to none"):
        check_offload("sequential", GPU, quantized=True)


def test_tiles_are_used_within_the_block_and_only_there(short_sd: Callable[[], Any]) -> None:
    vae = short_sd().vae
    with pytest.raises(KeyError), tiled(vae):
        assert vae.use_tiling
        raise KeyError
    assert not vae.use_tiling
    with tiled(vae, False):
        assert not vae.use_tiling
    vae.enable_tiling()
    with tiled(vae):
        pass
    assert vae.use_tiling


def test_a_tile_is_smaller_than_the_pictures_of_the_base_where_these_are_large(
    short_sd: Callable[[], Any],
) -> None:
    vae = short_sd().vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = 1024, 128  # SDXL's
    with tiled(vae):
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (1024, 128)


def test_sdxl_in_fp16_decodes_in_fp32_without_a_word_also_after_an_error(
    short_sdxl: Callable[[], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = short_sdxl()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        torch.nn.Module.to(part, torch.float16)
    settings = Settings(steps=1, guidance_scale=1.0)
    seen: list[torch.dtype] = []
    decode = pipe.vae.decode

    def fails_first(latents: torch.Tensor, **values: Any) -> Any:
        seen.append(latents.dtype)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, **values)

    monkeypatch.setattr(pipe.vae, "decode", fails_first)
    # The libraries' loggers do not hand on what they are told.
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with pytest.raises(torch.OutOfMemoryError):
            draw(pipe, ["x"], [0], settings=settings)
        assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}
        assert draw(pipe, ["x"], [0], settings=settings)
    assert seen == [torch.float32] * 2 and pipe.vae.dtype == torch.float16
    assert "float32" not in caplog.text and not {"to", "upcast_vae"} & {*vars(pipe.vae), *vars(pipe)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload needs a GPU")
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_an_offloaded_pipeline_draws_the_same_and_lies_on_the_cpu_afterwards(
    short_sd: Callable[[], Any], kind: Any
) -> None:
    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("x", num_inference_steps=2, generator=generator, output_type="pt").images.cpu()

    pipe = short_sd()
    pipe.to("cuda")
    wanted = draw()
    pipe.to("cpu")
    with offloaded(pipe, kind, GPU):
        assert torch.allclose(draw(), wanted, atol=1e-4)  # fp32 convolutions on a GPU may take TF32
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    assert not hasattr(pipe.unet, "_hf_hook")
