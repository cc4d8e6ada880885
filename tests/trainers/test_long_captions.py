"""Captions longer than a chunk: read as drawing reads them, beside shorter ones, and cut where asked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.data.cache import MemoryCache
from studio.data.folder import read_pictures
from studio.models.prompt_encoding import reading_prompts
from studio.models.tokens import AddedTokens
from studio.specs import TrainSpec
from studio.trainers.inputs import caption_note, make_prompts
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batch, TrainStep

CPU = torch.device("cpu")
# Of the tiny tokenizer every letter is a token.
LONG, SHORT = "x " * 100, "a (red) [dog"
BASES = pytest.mark.parametrize("model", ["short_sd", "short_sdxl"])
TRAINED = pytest.mark.parametrize("trained", [False, True], ids=["kept", "trained"])


@pytest.fixture(scope="module")
def pipes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: request.getfixturevalue(name)() for name in ("short_sd", "short_sdxl")}


def batch(captions: tuple[str, ...]) -> Batch:
    generator, size = torch.Generator().manual_seed(0), len(captions)
    latents, noise = (torch.randn((size, 4, 8, 8), generator=generator) for _ in range(2))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * size)
    timesteps = torch.arange(100, 100 + size)
    return Batch(latents, noise, timesteps, captions, sizes, torch.full((size,), 1 / size))


def row(given: Batch, place: int) -> Batch:
    """Return one sample of a batch as a batch of its own."""
    parts = {
        name: getattr(given, name)[place : place + 1]
        for name in ("latents", "noise", "timesteps", "captions", "size_conditions")
    }
    return replace(given, **parts, weights=torch.ones(1))


@BASES
@TRAINED
@torch.no_grad()
def test_captions_are_embedded_as_prompts_of_drawing(
    pipes: dict[str, Any], model: str, trained: bool
) -> None:
    pipe = pipes[model]
    prompts = Prompts(pipe, cache=MemoryCache(), trained=trained)
    given: dict[str, Any] = {
        "device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False,
    }  # fmt: skip
    plain = pipe.encode_prompt([SHORT, "fox"], **given)[0]
    short = prompts([SHORT, "fox"], CPU)
    assert short.mask is None
    if trained:
        assert torch.equal(short.embeddings, plain), "one batch of one chunk is the pipeline's own"
    embeddings, pooled, mask = prompts([LONG, SHORT, LONG * 2], CPU)
    assert mask is not None and mask.sum(1).tolist() == [154, 77, 231]
    with reading_prompts(pipe, raw=True):
        for place, caption in enumerate((LONG, SHORT, LONG * 2)):
            own, _, *others = pipe.encode_prompt(caption, **given)
            close = {"rtol": 1e-5, "atol": 1e-6}  # batches of other sizes sum in other orders
            torch.testing.assert_close(embeddings[place, : own.shape[1]], own[0], **close)
            if pooled is not None:
                torch.testing.assert_close(pooled[place], others[0][0], **close)


@BASES
@TRAINED
def test_a_short_caption_beside_a_long_one_acts_as_it_does_alone(
    pipes: dict[str, Any], model: str, trained: bool
) -> None:
    step = TrainStep(pipes[model], prompts=Prompts(pipes[model], cache=MemoryCache(), trained=trained))
    weight = step.text_encoders[0].get_input_embeddings().weight.requires_grad_(trained)
    given = batch((SHORT, LONG, ""))

    def gradient(*parts: Batch) -> tuple[float, torch.Tensor]:
        loss = torch.stack([step(part) for part in parts]).mean()
        return float(loss.detach()), torch.autograd.grad(loss, weight)[0] if trained else torch.zeros(1)

    together, alone = gradient(given), gradient(*(row(given, place) for place in range(3)))
    assert together[0] == pytest.approx(alone[0], rel=1e-5)  # fp32 sums
    torch.testing.assert_close(together[1], alone[1], rtol=1e-3, atol=1e-8)  # the same


@pytest.mark.parametrize("limit", [40, 80])
@torch.no_grad()
def test_what_is_beyond_the_limit_is_left_out(pipes: dict[str, Any], limit: int) -> None:
    pipe = pipes["short_sd"]
    cut = Prompts(pipe, max_tokens=limit)([LONG], CPU).embeddings
    assert torch.equal(cut, Prompts(pipe)(["x " * limit], CPU).embeddings)
    tokens = {"<toy>": {"text_encoder": torch.ones(3, 32)}}
    with AddedTokens(pipe, tokens):
        cut = Prompts(pipe, max_tokens=limit)(["x " * (limit - 2) + "<toy>"], CPU).embeddings
    assert torch.equal(cut, Prompts(pipe)(["x " * (limit - 2)], CPU).embeddings), "a token is not parted"


def test_long_captions_are_said_and_all_that_is_cut(pipes: dict[str, Any], folder: Path) -> None:
    (folder / "0.txt").write_text(LONG)
    (folder / "2.txt").write_text(LONG + "<toy>")
    pictures = read_pictures(folder, prompt="dog").pictures
    with AddedTokens(pipes["short_sd"], {"<toy>": {"text_encoder": torch.ones(3, 32)}}):
        notes = [caption_note(pipes["short_sd"], pictures, max_tokens=limit) for limit in (None, 9, 100, 103)]
    assert notes[0] is not None and "2 pictures have captions of more than 75 tokens" in notes[0]
    assert "at most 2.png (103 tokens)" in notes[0]
    assert notes[1] is not None and "2.png (103 tokens), 0.png (100 tokens), 1.png (9 tok" not in notes[1]
    assert "Warning: 2 pictures have captions of more than max_token_length (9)" in notes[1]
    assert notes[2] is not None and "1 picture has a caption" in notes[2] and "0.png" not in notes[2]
    assert notes[3] is None


@torch.no_grad()
def test_a_cache_on_disk_knows_where_captions_were_cut(
    pipes: dict[str, Any], spec: Callable[..., TrainSpec], tmp_path: Path
) -> None:
    def rows(limit: int | None) -> int:
        run = spec(cache="disk", cache_folder=tmp_path / "cache", max_token_length=limit)
        prompts = make_prompts(pipes["short_sd"], run, {LONG}, trained=False, tell=lambda _: None)
        return prompts([LONG], CPU).embeddings.shape[1]

    assert [rows(limit) for limit in (None, 75, 90, None)] == [154, 77, 154, 154]
