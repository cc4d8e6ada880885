"""Every part of the builder at tiny size, from renders to folders that plain diffusers loads."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from studio.assets.builder import autoencoder, bars, build, card, evaluator, measure, starters, tokenizer
from studio.assets.builder.autoencoder import AutoencoderSpec
from studio.assets.builder.dataset import render_many, texture_many
from studio.assets.builder.publish import hashes
from studio.assets.builder.recipe import RECIPES, STARTER, STARTER_DRAFT, STARTER_XL, Recipe
from studio.assets.builder.subjects import FULL
from studio.assets.builder.text_encoder import TextSpec
from studio.assets.builder.training import Machine, Schedule, train
from studio.assets.builder.unet import new_unet
from studio.specs import GenerateSpec

SIZE = 32
_TOKENS = 6500  # a little more than the tokenizer learns from its captions and prose
CODES = [
    AutoencoderSpec(patch=4, channels=6, widths=(12, 48, 48), groups=4),
    AutoencoderSpec(patch=8, channels=8, widths=(12, 48, 48, 48), groups=4),
]
TINY = replace(
    STARTER_DRAFT,
    size=SIZE,
    renders=96,
    textures=8,
    wordings=2,
    autoencoder=replace(CODES[0], widths=(16, 48, 48)),
    texts=(TextSpec(width=32, layers=2),),
    unet={"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 2, "layers_per_block": 1},
    text_schedule=Schedule(steps=2),
    decoder_schedule=Schedule(steps=2),
    unet_schedule=Schedule(steps=2, ema=0.9),
    decoder_batch=4,
    batch=4,
)
TINY_XL = replace(
    TINY,
    wordings=1,
    texts=(TextSpec(width=32, layers=2), TextSpec(width=32, layers=2, projected=True)),
    unet={"block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1},
)


def pictures(count: int) -> Tensor:
    textures = texture_many(count // 4, seed=2, size=SIZE, workers=1)
    return torch.cat([render_many(count, seed=2, size=SIZE, workers=1).pixels, textures])


@pytest.mark.parametrize("spec", CODES, ids=["patch4", "patch8"])
def test_the_encoder_computes_the_linear_code(spec: AutoencoderSpec) -> None:
    pixels = pictures(160)
    mean, components = autoencoder.principal_patches(pixels, patch=spec.patch, channels=spec.channels)
    vae = autoencoder.new_autoencoder(spec, scaling_factor=1.0, size=SIZE)
    autoencoder.set_linear_encoder(vae, spec, mean, components)
    with torch.no_grad():
        encoded = vae.encode(autoencoder.to_unit(pixels[:8])).latent_dist
    wanted = autoencoder.encode_linear(pixels[:8], components @ mean, components)
    assert (encoded.mean - wanted).abs().max() < 0.02  # the pairs move the norm by 0.2 % of values up to 10
    assert encoded.std.max() < 0.01
    offset, measured = autoencoder.linear_code(vae)
    read = autoencoder.encode_linear(pixels[:8], offset, measured)
    assert (read - encoded.mean).abs().max() < 0.02


def test_an_encoder_that_is_no_linear_code_is_refused() -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder(CODES[0], scaling_factor=1.0, size=SIZE)
    with pytest.raises(ValueError, match="no linear patch code"):
        autoencoder.linear_code(vae)


def test_the_components_are_orthonormal_and_in_order() -> None:
    pixels = pictures(160)
    mean, components = autoencoder.principal_patches(pixels, patch=4, channels=12)
    assert torch.allclose(
        components @ components.T, torch.eye(len(components)), atol=1e-5
    )  # fp32 of an fp64 solve
    spread = autoencoder.encode_linear(pixels, components @ mean, components).var((0, 2, 3))
    assert (spread[:-1] >= spread[1:] * 0.999).all()


def test_a_code_without_room_for_its_components_is_refused() -> None:
    spec = AutoencoderSpec(patch=4, channels=24, widths=(16, 48, 48), groups=8)
    with pytest.raises(ValueError, match="no room for 3 components"):
        autoencoder.set_linear_encoder(
            autoencoder.new_autoencoder(spec, scaling_factor=1.0, size=SIZE),
            spec,
            torch.zeros(48),
            torch.zeros(24, 48),
        )
    with pytest.raises(ValueError, match="takes 4 widths, the last two alike"):
        autoencoder.new_autoencoder(replace(spec, patch=8), scaling_factor=1.0, size=SIZE)


def test_the_decoder_learns_to_invert_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, spec = pictures(160), CODES[0]
    mean, components = autoencoder.principal_patches(pixels, patch=spec.patch, channels=spec.channels)
    vae = autoencoder.new_autoencoder(spec, scaling_factor=1.0, size=SIZE)
    autoencoder.set_linear_encoder(vae, spec, mean, components)
    before = autoencoder.reconstruction_psnr(vae, pixels[120:160])
    autoencoder.train_decoder(
        vae,
        pixels[:120],
        schedule=Schedule(steps=12, rate=2e-3, warmup=2),
        machine=Machine(),
        state=tmp_path / "state.pt",
        batch=8,
    )
    assert autoencoder.reconstruction_psnr(vae, pixels[120:160]) > before + 2


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


class TestTraining:
    @staticmethod
    def run(state: Path, *, steps: int, stop: int | None = None) -> nn.Module:
        """Train a line until ``steps`` in all; with ``stop``, the loss itself runs out of time there."""
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        machine = Machine(deadline=float("inf"))
        schedule = Schedule(steps=steps, warmup=2, ema=0.9)

        def loss_at(step: int) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=machine.generator(0, step))
            return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()

        every_step = replace(machine, save_seconds=0)
        return train(model, loss_at, schedule=schedule, machine=every_step, state=state, name="line").average

    def test_a_run_that_was_cut_short_ends_as_one_that_was_not(self, tmp_path: Path) -> None:
        whole = self.run(tmp_path / "whole.pt", steps=9)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "cut.pt", steps=9, stop=5)
        resumed = self.run(tmp_path / "cut.pt", steps=9)
        assert all(
            torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True)
        )

    def test_a_deadline_stops_a_run_before_its_first_step(self, tmp_path: Path) -> None:
        stopped = train(
            nn.Linear(1, 1),
            lambda step: pytest.fail("the time was up"),
            schedule=Schedule(steps=5),
            machine=Machine(deadline=0.0),
            state=tmp_path / "state.pt",
            name="line",
        )
        assert stopped.step == 0 and not stopped.done and (tmp_path / "state.pt").exists()

    def test_the_rate_rises_holds_and_falls_to_zero_by_steps_or_by_seconds(self) -> None:
        schedule = Schedule(steps=1000, rate=1.0, warmup=10, decay=0.5)
        rates = [schedule.rate_at(step, 0) for step in (0, 9, 499, 750, 999)]
        assert rates[:3] == [0.1, 1.0, 1.0]
        assert rates[3] == pytest.approx(0.5) and rates[4] < 1e-4
        timed = replace(schedule, seconds=100)
        assert [timed.rate_at(500, spent) for spent in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])


@dataclass(frozen=True)
class Built:
    work: Path
    folder: Path


def built(recipe: Recipe, root: Path, *, vae: Path | None = None) -> Built:
    """Build a recipe in two runs, the first of which has no time, with weights in several small files."""
    work, folder = root / "work", root / "model"
    work.mkdir()
    shop = build.Workshop(recipe, work, Machine(), workers=1)
    if vae is not None:
        build.take_autoencoder(vae, shop)
    shop.note(command="python -m studio.assets.builder.build tiny")
    assert not build.build(replace(shop, machine=Machine(deadline=0.0)), folder, shard="200KB")
    assert build.build(shop, folder, shard="200KB")
    return Built(work, folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(TINY, tmp_path_factory.mktemp("tiny"))


def check_pipeline(model: Built, kind: type[DiffusionPipeline]) -> None:
    assert len(list(model.folder.glob("unet/*.safetensors"))) > 1
    pipe = DiffusionPipeline.from_pretrained(model.folder, torch_dtype=torch.float32)
    assert type(pipe) is kind
    trained = torch.load(model.work / "unet.pt", weights_only=True)
    assert trained["step"] == 2
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, trained["average"][name].half().float()), name
    assert pipe("a fox", num_inference_steps=1, output_type="np").images.shape == (1, SIZE, SIZE, 3)


def test_a_tiny_recipe_gives_a_folder_that_plain_diffusers_loads(tiny: Built) -> None:
    check_pipeline(tiny, StableDiffusionPipeline)


def test_a_tiny_xl_recipe_takes_the_autoencoder_of_another(tiny: Built, tmp_path: Path) -> None:
    model = built(TINY_XL, tmp_path, vae=tiny.folder / "vae")
    check_pipeline(model, StableDiffusionXLPipeline)
    own, taken = (AutoencoderKL.from_pretrained(each.folder / "vae").state_dict() for each in (model, tiny))
    assert all(torch.equal(own[name], taken[name]) for name in taken)


def test_a_published_model_is_where_another_training_begins(tiny: Built, tmp_path: Path) -> None:
    still = replace(TINY, unet_schedule=Schedule(steps=1, rate=0.0, ema=0.9))
    shop = build.Workshop(still, tmp_path, Machine(), workers=1)
    build.take_model(tiny.folder, shop)
    assert build.build(shop, tmp_path / "model")
    for part in ("vae", "text_encoder", "unet"):
        own, begun = (
            {
                key: value
                for path in sorted((folder / part).glob("*.safetensors"))
                for key, value in load_file(path).items()
            }
            for folder in (tmp_path / "model", tiny.folder)
        )
        assert own.keys() == begun.keys() and all(torch.equal(own[key], begun[key]) for key in own), part
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    assert not config.get("_name_or_path")


def test_a_model_of_another_shape_is_no_beginning(tiny: Built, tmp_path: Path) -> None:
    wider = replace(TINY, unet=TINY.unet | {"layers_per_block": 2})
    with pytest.raises(SystemExit, match="not of starter-draft's shape: layers_per_block"):
        build.take_model(tiny.folder, build.Workshop(wider, tmp_path, Machine()))


def test_an_autoencoder_of_another_shape_is_refused(tiny: Built, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="starter wants 8 and 16"):
        build.take_autoencoder(tiny.folder / "vae", build.Workshop(STARTER, tmp_path, Machine()))


def test_the_card_says_what_was_measured_and_lists_the_files(
    tiny: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = measure.draw

    def quick(pipe: DiffusionPipeline, prompts: list[str], **how: Any) -> list[Image.Image]:
        return draw(pipe, prompts, **(how | {"steps": 1}))

    for module in (bars, measure):
        monkeypatch.setattr(module, "draw", quick)
    monkeypatch.setattr(bars, "GUIDANCE", (1.0,))
    monkeypatch.setattr(bars, "SOLVERS", ("euler",))
    monkeypatch.setattr(bars, "RENDERS", 8)
    # As if the evaluator had been trained for pictures of this size; it scales what it is shown.
    monkeypatch.setattr(starters, "FOLDER", tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps({"vocabulary": TINY.vocabulary.name, "size": TINY.size}))
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.new("RGB", (50, 40), "teal").save(photographs / "one.png")

    def make(**machine: float) -> bool:
        shop = build.Workshop(TINY, tiny.work, Machine(**machine), workers=1)
        return starters.make(shop, tiny.folder, prompts=2, sweep=2, photographs=photographs)

    assert not make(deadline=0.0) and make()
    facts = json.loads((tiny.work.parent / "measured" / TINY.name / "bars.json").read_text())
    text = (tiny.folder / "README.md").read_text()
    share = facts["settings"]["euler"]["subject"]["share"]
    assert f"| euler | **{share:.1%} (" in text and "| unknown word |" in text
    assert f"| autoencoder, 1 photographs | {facts['autoencoder']['photographs']} dB | 22 dB |" in text
    assert card.listed_hashes(text) == hashes(tiny.folder)
    (tiny.folder / "model_index.json").write_text("{}")
    assert card.listed_hashes(text) != hashes(tiny.folder)


def test_an_evaluator_is_loaded_with_the_vocabulary_and_the_size_it_was_trained_for(tmp_path: Path) -> None:
    trained, training = evaluator.train_evaluator(
        FULL,
        size=SIZE,
        renders=16,
        schedule=Schedule(steps=2),
        machine=Machine(),
        state=tmp_path / "state.pt",
        batch=4,
        workers=1,
    )
    assert training.done
    evaluator.save_evaluator(trained, tmp_path / "evaluator")
    loaded = evaluator.load_evaluator(tmp_path / "evaluator")
    assert loaded.vocabulary is FULL and loaded.size == SIZE
    wanted = (FULL.all_subjects, FULL.all_styles, FULL.all_backgrounds)
    one, two = (model(torch.zeros(1, 3, SIZE, SIZE)) for model in (trained, loaded))
    assert [logits.shape[1] for logits in two] == [len(names) for names in wanted]
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(one, two, strict=True))  # fp16 weights
    assert (tmp_path / "evaluator" / "model.safetensors").stat().st_size < 4_000_000


@pytest.mark.parametrize(("name", "megabytes"), [("starter", 40), ("starter-xl", 80)])
def test_a_full_recipe_stays_within_its_size(name: str, megabytes: int) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        parts: list[nn.Module] = [
            new_unet(recipe.unet_shape),
            autoencoder.new_autoencoder(recipe.autoencoder, scaling_factor=1.0, size=recipe.size),
        ]
    weights = sum(value.numel() for part in parts for value in part.parameters())
    for text in recipe.texts:
        # Embeddings of tokens and positions, and per layer four products of attention and two of width 4.
        weights += text.width * (_TOKENS + 77) + text.layers * 12 * text.width**2
    tokenizers_and_pictures = 1_500_000 * len(recipe.texts)
    assert 2 * weights + tokenizers_and_pictures <= megabytes * 1_000_000


def test_the_xl_recipe_has_the_blocks_of_sdxl() -> None:
    with torch.device("meta"):
        names = set(new_unet(STARTER_XL.unet_shape).state_dict())
    for block in ("down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.0.attentions.2"):
        assert f"{block}.transformer_blocks.0.attn2.to_q.weight" in names
    assert not [name for name in names if name.startswith(("down_blocks.0.attentions", "down_blocks.3"))]


def test_the_starter_recipe_has_the_blocks_of_stable_diffusion_1() -> None:
    with torch.device("meta"):
        names = set(new_unet(STARTER.unet_shape).state_dict())
        full = set(UNet2DConditionModel(sample_size=64, cross_attention_dim=768).state_dict())
    assert not full - names


def test_every_solver_that_a_user_may_choose_is_measured() -> None:
    offered = set(get_args(GenerateSpec.model_fields["scheduler"].annotation))
    assert offered - {"default"} == set(bars.SOLVERS)
