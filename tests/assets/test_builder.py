"""Every part of the builder at tiny size, from renders to a folder that plain diffusers loads."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from studio.assets.builder import autoencoder, build, text_encoder, tokenizer, unet
from studio.assets.builder.dataset import Renders, render_many

SIZE = 32  # half the starter's, so that it takes a quarter of the time


@pytest.fixture(scope="module")
def renders() -> Renders:
    return render_many(320, seed=2, size=SIZE, workers=1)


def test_the_encoder_computes_the_linear_code(renders: Renders) -> None:
    mean, components = autoencoder.principal_patches(renders.pixels)
    vae = autoencoder.new_autoencoder(scaling_factor=1.0, size=SIZE)
    autoencoder.set_linear_encoder(vae, mean, components)
    with torch.no_grad():
        encoded = vae.encode(autoencoder.to_unit(renders.pixels[:8])).latent_dist
    wanted = autoencoder.encode_linear(renders.pixels[:8], mean, components)
    assert (encoded.mean - wanted).abs().max() < 0.02  # the constant pair leaves 0.2 % of values up to 4
    assert encoded.std.max() < 0.01


def test_the_components_are_orthonormal_and_in_order(renders: Renders) -> None:
    mean, components = autoencoder.principal_patches(renders.pixels)
    assert torch.allclose(
        components @ components.T, torch.eye(len(components)), atol=1e-5
    )  # fp32 of an fp64 solve
    spread = autoencoder.encode_linear(renders.pixels, mean, components).var((0, 2, 3))
    assert (spread[:-1] >= spread[1:] * 0.999).all()


def test_the_decoder_learns_to_invert_the_encoder(renders: Renders) -> None:
    torch.manual_seed(0)
    mean, components = autoencoder.principal_patches(renders.pixels)
    vae = autoencoder.new_autoencoder(scaling_factor=1.0, size=SIZE)
    autoencoder.set_linear_encoder(vae, mean, components)
    before = autoencoder.reconstruction_psnr(vae, renders.pixels[-40:])
    assert autoencoder.train_decoder(vae, renders.pixels, steps=12, batch=8) > before + 3


def test_the_tokenizer_encodes_any_text(tmp_path: Path) -> None:
    trained = tokenizer.train_tokenizer()
    assert len(trained) <= tokenizer.VOCABULARY
    for text in ("a photo of sks fox", "ohwx zwx 8-bit", "naïve 狐 🦊"):
        ids = trained(text).input_ids
        assert ids[0] == trained.bos_token_id and ids[-1] == trained.eos_token_id
        assert trained.unk_token_id not in ids[1:-1]
        assert trained.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    tokenizer.save_tokenizer(trained, tmp_path)
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_a_tiny_build_gives_a_folder_that_plain_diffusers_loads(tmp_path: Path, renders: Renders) -> None:
    work = tmp_path / "work"
    work.mkdir()
    words, encoder = build.build_text(work, steps=2)
    vae = build.build_autoencoder(work, renders.pixels, steps=2)
    latents = build.encode_all(vae, renders.pixels[:16])
    text = text_encoder.embed(encoder, text_encoder.token_ids(words, [*renders.captions[:16], ""]))

    def save(model: torch.nn.Module, step: int) -> None:
        half = unet.new_unet(latent_size=SIZE // autoencoder.PATCH).half()
        half.load_state_dict(model.state_dict())
        half.save_pretrained(work / "unet")
        build.publish(work, tmp_path / "starter")

    for steps in (1, 2):  # the second run goes on from the first one's state
        spec = unet.UNetTraining(steps=steps, batch=2, compile=False)
        unet.train_unet(
            unet.new_unet(latent_size=SIZE // autoencoder.PATCH),
            latents,
            text[:-1],
            text[-1],
            spec=spec,
            state=work / "state.pt",
            save=save,
        )
    assert torch.load(work / "state.pt", weights_only=True)["step"] == 2
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "starter", torch_dtype=torch.float32)
    assert pipe("a fox", num_inference_steps=1, output_type="np").images.shape == (1, SIZE, SIZE, 3)
