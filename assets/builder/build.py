"""Build the starter: tokenizer, text encoder, autoencoder, UNet. A second run goes on from the first.

python -m studio.assets.builder.build --work build/starter --steps 6000 --decay 1500
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from studio.assets.builder import autoencoder, text_encoder, unet
from studio.assets.builder.dataset import render_many
from studio.assets.builder.tokenizer import save_tokenizer, stranger_words, train_tokenizer

STARTER = Path(__file__).resolve().parent.parent / "starter"
_CODE_PICTURES = 4096  # the patch code is fitted on so many of the first renders


def _facts(work: Path, **facts: float) -> None:
    """Remember measured facts for the model card."""
    path = work / "facts.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | facts, indent=2, sort_keys=True) + "\n")


def build_text(work: Path, *, steps: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Return the tokenizer and text encoder, trained where the work folder does not hold them yet."""
    if not (work / "text_encoder").exists():
        save_tokenizer(train_tokenizer(), work / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        model = text_encoder.new_text_encoder(tokenizer)
        right = text_encoder.train_text_encoder(model, tokenizer, steps=steps, strangers=stranger_words(3000))
        _facts(work, captions_read_right=right)
        model.half().save_pretrained(work / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    return tokenizer, CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)


def build_autoencoder(work: Path, pixels: Tensor, *, steps: int) -> AutoencoderKL:
    """Return the autoencoder, trained where the work folder does not hold it yet."""
    if not (work / "vae").exists():
        mean, components = autoencoder.principal_patches(pixels[:_CODE_PICTURES])
        latents = autoencoder.encode_linear(pixels[:_CODE_PICTURES], mean, components)
        torch.manual_seed(0)
        vae = autoencoder.new_autoencoder(
            scaling_factor=round(1 / float(latents.std()), 5), size=pixels.shape[-1]
        )
        autoencoder.set_linear_encoder(vae, mean, components)
        error = (vae.encode(autoencoder.to_unit(pixels[:64])).latent_dist.mean - latents[:64]).abs().max()
        _facts(
            work,
            encoder_vs_linear_code=float(error),
            reconstruction_psnr=autoencoder.train_decoder(vae, pixels, steps=steps),
        )
        vae.half().save_pretrained(work / "vae")
    return AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32)


def encode_all(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return scaled latents ``[N, C, h, w]`` in bf16, by the linear code that the encoder computes."""
    mean, components = autoencoder.principal_patches(pixels[:_CODE_PICTURES])
    parts = [autoencoder.encode_linear(chunk, mean, components) for chunk in pixels.split(1024)]
    return torch.cat([(part * vae.config.scaling_factor).bfloat16() for part in parts])


def publish(work: Path, folder: Path) -> None:
    """Write the diffusers folder in fp16 from the parts in the work folder."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet", torch_dtype=torch.float16),
        scheduler=unet.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    save_tokenizer(pipeline.tokenizer, folder / "tokenizer")


def main() -> None:
    """Build what is missing, train the UNet to the step asked for, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of parts and state; a second run resumes there"
    )
    parser.add_argument("--output", type=Path, default=STARTER, help="diffusers folder to publish to")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--renders", type=int, default=61_440, help="pictures to render and hold in memory")
    parser.add_argument("--text-steps", type=int, default=500)
    parser.add_argument("--decoder-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=6000, help="UNet step to stop at")
    parser.add_argument(
        "--decay", type=int, default=1500, help="last UNet steps with a falling learning rate"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-compile", action="store_true", help="do not compile the UNet")
    parser.add_argument("--save-minutes", type=float, default=10)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tokenizer, encoder = build_text(args.work, steps=args.text_steps)
    renders = render_many(args.renders, seed=1, size=args.size, strangers=stranger_words(3000))
    vae = build_autoencoder(args.work, renders.pixels, steps=args.decoder_steps)
    cache = args.work / "cache.safetensors"
    if not cache.exists():
        ids = text_encoder.token_ids(tokenizer, [*renders.captions, ""])
        save_file(
            {"latents": encode_all(vae, renders.pixels), "text": text_encoder.embed(encoder, ids)}, cache
        )
    data = load_file(cache)

    def save(model: UNet2DConditionModel, step: int) -> None:
        half = unet.new_unet(latent_size=args.size // autoencoder.PATCH).half()
        half.load_state_dict(model.state_dict())
        half.save_pretrained(args.work / "unet")
        _facts(args.work, unet_steps=step, unet_samples=step * args.batch, renders=args.renders)
        publish(args.work, args.output)

    spec = unet.UNetTraining(
        steps=args.steps, decay=args.decay, batch=args.batch, device=args.device, compile=not args.no_compile
    )
    loss = unet.train_unet(
        unet.new_unet(latent_size=args.size // autoencoder.PATCH),
        data["latents"],
        data["text"][:-1],
        data["text"][-1],
        spec=spec,
        state=args.work / "state.pt",
        save=save,
        every_seconds=60 * args.save_minutes,
    )
    _facts(args.work, unet_loss=loss, hours_of_last_run=round((time.monotonic() - start) / 3600, 2))


if __name__ == "__main__":
    main()
