"""What is shipped: the starter and the evaluator as files, and what the evaluator is worth."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from studio.assets.builder.card import listed_hashes
from studio.assets.builder.evaluator import FOLDER, judge, load_evaluator, measure
from studio.assets.builder.publish import hashes
from studio.assets.builder.render import render
from studio.assets.builder.subjects import ALL_STYLES, HELD_OUT_SUBJECTS

ASSETS = Path(str(files("studio.assets")))
STARTER = Path(str(files("studio.assets") / "starter"))


SHIPPED_STARTERS = sorted(path.parent for path in ASSETS.glob("starter*/model_index.json"))


@pytest.mark.parametrize("folder", SHIPPED_STARTERS, ids=lambda folder: folder.name)
def test_the_shipped_files_are_those_of_the_card(folder: Path) -> None:
    assert listed_hashes((folder / "README.md").read_text()) == hashes(folder)


@pytest.mark.parametrize("folder", SHIPPED_STARTERS, ids=lambda folder: folder.name)
def test_a_starter_is_light_and_holds_no_pickles(folder: Path) -> None:
    limit = {"starter": 40_000_000, "starter-xl": 80_000_000}[folder.name]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= limit
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


@pytest.fixture(scope="module")
def starter() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(STARTER, torch_dtype=torch.float32)


def test_the_starter_is_made_of_stable_diffusion_1_classes(starter: StableDiffusionPipeline) -> None:
    assert isinstance(starter.unet, UNet2DConditionModel) and isinstance(starter.vae, AutoencoderKL)
    assert isinstance(starter.text_encoder, CLIPTextModel) and isinstance(starter.tokenizer, CLIPTokenizer)
    with torch.device("meta"):
        full = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # SD 1.5's layout is the default
    ours, wanted = set(starter.unet.state_dict()), set(full.state_dict())
    # The last two levels have one width in SD 1.5 and two here, which takes one more 1x1 convolution.
    assert not wanted - ours
    assert {name.rsplit(".", 2)[1] for name in ours - wanted} == {"conv_shortcut"}


def test_all_weights_are_finite(starter: StableDiffusionPipeline) -> None:
    for part in (starter.unet, starter.vae, starter.text_encoder):
        assert all(bool(value.isfinite().all()) for value in part.state_dict().values())


def test_the_evaluator_weighs_at_most_4_megabytes() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000


def test_the_evaluator_is_right_on_98_percent_of_fresh_renders() -> None:
    shares = measure(load_evaluator(), seed=31337, count=1024)
    assert min(shares.values()) >= 0.98, shares


def test_the_evaluator_facts_are_there() -> None:
    facts = json.loads((FOLDER / "facts.json").read_text())
    assert min(facts["accuracy_on_4096_fresh_renders"].values()) >= 0.98


@pytest.mark.parametrize("style", ALL_STYLES)
def test_the_evaluator_names_held_out_subjects_in_every_style(style: str) -> None:
    verdicts = judge([render(subject.name, style, "yellow") for subject in HELD_OUT_SUBJECTS])
    assert [verdict.style for verdict in verdicts] == [style] * len(verdicts)
    assert [verdict.subject for verdict in verdicts] == [subject.name for subject in HELD_OUT_SUBJECTS]
