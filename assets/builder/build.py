"""Build an embedded base model: autoencoder, latents, text encoders, UNet; the next run goes on from here.

python -m studio.assets.builder.build starter --device cuda --minutes 9 --unet-minutes 22
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from studio.assets.builder import autoencoder, text_encoder
from studio.assets.builder.captions import caption
from studio.assets.builder.dataset import render_many, texture_many
from studio.assets.builder.publish import SHARD, load_text_encoders, publish
from studio.assets.builder.recipe import RECIPES, Recipe
from studio.assets.builder.subjects import Vocabulary
from studio.assets.builder.tokenizer import save_tokenizer, stranger_words, train_tokenizer
from studio.assets.builder.training import Machine, Training
from studio.assets.builder.unet import Samples, new_unet, train_unet

ASSETS = Path(__file__).resolve().parent.parent
STARTER = ASSETS / "starter"
_STRANGERS = 3000
_CODE_PICTURES = 4096  # the patch code is fitted on so many renders, and on a quarter as many textures
_DECODER_PICTURES = 16_384
_SLICE = 16_384  # pictures in memory at a time
_HELD = 256  # pictures kept apart to measure the reconstruction


@dataclass(frozen=True)
class Workshop:
    """Where a recipe is built.

    Attributes:
        recipe: What is built.
        folder: Of parts and states; a second run goes on from there.
        machine: Device and deadline.
        workers: Processes that render.
    """

    recipe: Recipe
    folder: Path
    machine: Machine
    workers: int = 2

    def note(self, **facts: object) -> None:
        """Remember facts for the model card."""
        path = self.folder / "facts.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | facts, indent=2, sort_keys=True) + "\n")

    def pixels(self, renders: int, textures: int, *, seed: int) -> Tensor:
        """Return renders (subjects anywhere) and textures ``[N, 3, size, size]`` uint8 to code."""
        recipe, size = self.recipe, self.recipe.size
        pictures = render_many(
            renders, seed=seed, size=size, vocabulary=recipe.vocabulary, workers=self.workers
        ).pixels
        if not textures:
            return pictures
        return torch.cat([pictures, texture_many(textures, seed=seed, size=size, workers=self.workers)])


def build_code(shop: Workshop) -> AutoencoderKL:
    """Return the autoencoder in fp32 with its encoder set; the work folder's where it holds one."""
    recipe, folder = shop.recipe, shop.folder / "vae"
    if not folder.exists():
        count = min(_CODE_PICTURES, recipe.renders)
        pixels = shop.pixels(count, min(count // 4, recipe.textures), seed=2)
        spec = recipe.autoencoder
        mean, components = autoencoder.principal_patches(pixels, patch=spec.patch, channels=spec.channels)
        latents = autoencoder.encode_linear(pixels[:count], components @ mean, components)
        torch.manual_seed(0)
        vae = autoencoder.new_autoencoder(
            spec, scaling_factor=round(1 / float(latents.std()), 5), size=recipe.size
        )
        autoencoder.set_linear_encoder(vae, spec, mean, components)
        vae.half().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


def build_decoder(shop: Workshop, vae: AutoencoderKL) -> bool:
    """Train the decoder; return whether that is over."""
    recipe, machine = shop.recipe, shop.machine
    done = shop.folder / "vae.done"
    if done.exists():
        return True
    pixels = shop.pixels(min(_DECODER_PICTURES, recipe.renders), recipe.textures, seed=3)
    training = autoencoder.train_decoder(
        vae,
        pixels,
        schedule=recipe.decoder_schedule,
        machine=machine,
        state=shop.folder / "decoder.pt",
        batch=recipe.decoder_batch,
    )
    vae.to("cpu").half().save_pretrained(shop.folder / "vae")
    if training.done:
        done.touch()
        held = min(_HELD, recipe.renders)
        fresh = render_many(held, seed=4, size=recipe.size, vocabulary=recipe.vocabulary, workers=1).pixels
        vae = vae.float().to(machine.torch_device)
        offset, components = autoencoder.linear_code(vae)
        with torch.no_grad():
            unit = autoencoder.to_unit(fresh[:64]).to(vae.device)
            error = vae.encode(unit).latent_dist.mean.cpu() - autoencoder.encode_linear(
                fresh[:64], offset, components
            )
        shop.note(
            reconstruction_psnr=autoencoder.reconstruction_psnr(vae, fresh),
            encoder_vs_linear_code=float(error.abs().max()),
        )
    return training.done


def build_text(shop: Workshop) -> bool:
    """Train tokenizer and text encoders; return whether that is over."""
    recipe, work = shop.recipe, shop.folder
    if (work / f"text_encoder_{len(recipe.texts)}").exists():
        return True
    if not (work / "tokenizer").exists():
        save_tokenizer(train_tokenizer(recipe.vocabulary), work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoders = [
        text_encoder.new_text_encoder(tokenizer, spec, seed=seed) for seed, spec in enumerate(recipe.texts)
    ]
    training, right = text_encoder.train_text_encoders(
        encoders,
        recipe.texts,
        tokenizer,
        recipe.vocabulary,
        schedule=recipe.text_schedule,
        machine=shop.machine,
        state=work / "text.pt",
        strangers=stranger_words(_STRANGERS, recipe.vocabulary),
    )
    if training.done:
        shop.note(captions_read_right=right)
        for number, encoder in enumerate(encoders, 1):
            encoder.to("cpu").half().save_pretrained(work / f"text_encoder_{number}")
    return training.done


def encode_renders(shop: Workshop, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return scaled latents in bf16, labels and time ids of all renders.

    The latents come from the linear code that the encoder computes, at a fraction of its cost.
    """
    recipe, path = shop.recipe, shop.folder / "latents.safetensors"
    if not path.exists():
        offset, components = autoencoder.linear_code(vae)
        parts: dict[str, list[Tensor]] = {"latents": [], "labels": [], "time_ids": []}
        for start in range(0, recipe.renders, _SLICE):
            renders = render_many(
                min(_SLICE, recipe.renders - start),
                seed=1000 + start,
                size=recipe.size,
                vocabulary=recipe.vocabulary,
                framed=recipe.sdxl,
                cells=recipe.cells,
                workers=shop.workers,
            )
            for chunk in renders.pixels.split(1024):
                latents = autoencoder.encode_linear(chunk, offset, components)
                parts["latents"].append((latents * vae.config.scaling_factor).bfloat16())
            parts["labels"].append(renders.labels)
            parts["time_ids"].append(renders.time_ids)
        save_file({name: torch.cat(part) for name, part in parts.items()}, path)
    data: dict[str, Tensor] = load_file(path)
    return data


def word(tokenizer: CLIPTokenizer, vocabulary: Vocabulary, *, wordings: int, seed: int = 0) -> Tensor:
    """Return ``[K, wordings, 77]`` int32 token ids: captions of all combinations of the vocabulary.

    Subjects come first, then styles, then backgrounds: the last changes fastest.
    """
    rng = random.Random(seed)
    strangers = stranger_words(_STRANGERS, vocabulary)
    return torch.stack(
        [
            text_encoder.token_ids(
                tokenizer,
                [caption(subject, style, ground, rng, strangers=strangers) for _ in range(wordings)],
            ).int()
            for subject, style, ground in product(
                vocabulary.subjects, vocabulary.styles, vocabulary.backgrounds
            )
        ]
    )


def build_unet(shop: Workshop, data: dict[str, Tensor], output: Path, *, shard: str = SHARD) -> Training:
    """Train the UNet and publish the model at every save."""
    recipe, work = shop.recipe, shop.folder
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    path = work / "captions.safetensors"
    if not path.exists():
        save_file({"ids": word(tokenizer, recipe.vocabulary, wordings=recipe.wordings)}, path)
    styles, grounds = len(recipe.vocabulary.styles), len(recipe.vocabulary.backgrounds)
    wording = data["labels"] @ torch.tensor([styles * grounds, grounds, 1])
    empty = text_encoder.token_ids(tokenizer, [""])[0]

    def save(training: Training) -> None:
        half = new_unet(recipe.unet_shape).half()
        half.load_state_dict(training.average.state_dict())
        half.save_pretrained(work / "unet")
        shop.note(
            unet_steps=training.step,
            unet_minutes=round(training.spent / 60, 1),
            unet_loss=round(training.loss, 5),
            batch=recipe.batch,
            renders=recipe.renders,
            machine=machine_name(shop.machine),
        )
        publish(recipe, work, output, shard=shard)

    unet = new_unet(recipe.unet_shape)
    if (work / "unet").exists():
        # Of a published model, or of the last save, whose state file replaces it.
        unet = UNet2DConditionModel.from_pretrained(work / "unet", torch_dtype=torch.float32)
    return train_unet(
        unet,
        Samples(data["latents"], data["time_ids"], wording, load_file(path)["ids"], empty),
        load_text_encoders(recipe, work, torch.float32),
        schedule=recipe.unet_schedule,
        machine=shop.machine,
        state=work / "unet.pt",
        batch=recipe.batch,
        save=save,
    )


def machine_name(machine: Machine) -> str:
    """Return what the model card says of the machine."""
    name = torch.cuda.get_device_name() if machine.device == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def build(shop: Workshop, output: Path, *, shard: str = SHARD) -> bool:
    """Build what is missing and publish; return whether all is done.

    Args:
        shop: Recipe, folder and machine.
        output: Diffusers folder to write.
        shard: Largest file of weights.
    """
    vae = build_code(shop)
    data = encode_renders(shop, vae)
    if not (
        build_decoder(shop, vae) and build_text(shop) and build_unet(shop, data, output, shard=shard).done
    ):
        return False
    # Another run may have finished the training, and its output may have been put back since.
    publish(shop.recipe, shop.folder, output, shard=shard)
    return True


def take_autoencoder(source: Path, shop: Workshop) -> None:
    """Copy a finished autoencoder into a workshop that has none.

    Raises:
        SystemExit: If it is not of the recipe's shape.
    """
    if (shop.folder / "vae").exists():
        return
    spec, config = shop.recipe.autoencoder, AutoencoderKL.load_config(source)
    found = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    if found != (spec.patch, spec.channels):
        raise SystemExit(
            f"{source} codes patches of {found[0]} pixels in {found[1]} channels, {shop.recipe.name} wants "
            f"{spec.patch} and {spec.channels}. Build the recipe that it comes from first."
        )
    shutil.copytree(source, shop.folder / "vae")
    (shop.folder / "vae.done").touch()


def take_model(source: Path, shop: Workshop) -> None:
    """Copy a published model into an empty workshop: its UNet's training begins anew from these weights.

    Raises:
        SystemExit: If it is not of the recipe's shape.
    """
    if (shop.folder / "unet").exists():
        return
    take_autoencoder(source / "vae", shop)
    # As a file holds it, which knows no tuples.
    shape = json.loads(json.dumps(dict(new_unet(shop.recipe.unet_shape).config)))
    config = UNet2DConditionModel.load_config(source / "unet")
    if changed := [name for name, value in config.items() if name[0] != "_" and shape[name] != value]:
        raise SystemExit(
            f"the UNet in {source} is not of {shop.recipe.name}'s shape: {', '.join(changed)}. Leave out "
            "--from to begin without it."
        )
    for number in range(1, len(shop.recipe.texts) + 1):
        name = "text_encoder" if number == 1 else f"text_encoder_{number}"
        shutil.copytree(source / name, shop.folder / f"text_encoder_{number}")
    shutil.copytree(source / "tokenizer", shop.folder / "tokenizer")
    # In one file: the index of several would outlive the next save.
    unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float16)
    unet.save_pretrained(shop.folder / "unet")
    shop.note(begun_from=source.name)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to build, where and how long."""
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--work", type=Path, help="folder of parts and states (default: build/RECIPE)")
    parser.add_argument("--output", type=Path, help="diffusers folder to write (default: assets/RECIPE)")
    parser.add_argument("--vae", type=Path, help="take this finished autoencoder, such as assets/starter/vae")
    parser.add_argument(
        "--from", dest="source", type=Path, help="go on from the weights of this published model"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--decoder-minutes", type=float, help="train the decoder so long in all")
    parser.add_argument("--unet-minutes", type=float, help="train the UNet so long in all, over all runs")
    parser.add_argument("--steps", type=int, help="train the UNet so many steps in all, over all runs")
    parser.add_argument("--batch", type=int, help="samples per step of the UNet")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that render")
    parser.add_argument("--no-compile", action="store_true", help="do not compile networks")
    parser.add_argument("--save-minutes", type=float, default=4)


def open_workshop(args: argparse.Namespace) -> tuple[Workshop, Path]:
    """Return the workshop and the output folder that the options of ``add_options`` describe."""
    recipe: Recipe = RECIPES[args.recipe]
    recipe = replace(
        recipe,
        decoder_schedule=replace(
            recipe.decoder_schedule, seconds=args.decoder_minutes and 60 * args.decoder_minutes
        ),
        unet_schedule=replace(
            recipe.unet_schedule,
            steps=args.steps or recipe.unet_schedule.steps,
            seconds=args.unet_minutes and 60 * args.unet_minutes,
        ),
        batch=args.batch or recipe.batch,
    )
    machine = Machine(
        args.device,
        not args.no_compile,
        time.monotonic() + 60 * args.minutes,
        save_seconds=60 * args.save_minutes,
    )
    shop = Workshop(recipe, args.work or Path("build") / recipe.name, machine, args.workers)
    shop.folder.mkdir(parents=True, exist_ok=True)
    if args.source:
        take_model(args.source, shop)
    if args.vae:
        take_autoencoder(args.vae, shop)
    module = f"studio.assets.builder.{Path(sys.argv[0]).stem}"
    shop.note(command=" ".join(["python -m", module, *sys.argv[1:]]))
    return shop, args.output or ASSETS / recipe.name


def main() -> None:
    """Build until all is done or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    done = build(*open_workshop(parser.parse_args()))
    print("done" if done else "time is up: the same command goes on from here")


if __name__ == "__main__":
    main()
