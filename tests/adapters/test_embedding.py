"""Embedding files: written as other tools read them, and read as other tools write them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.errors import AdapterError
from studio.models.tokens import AddedTokens
from studio.registry import FORMATS

Factory = Callable[[], Any]


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def encoded(pipe: Any) -> Any:
    return pipe.encode_prompt(
        prompt="a <toy>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )


def token(**embeddings: Tensor) -> Adapter:
    return Adapter("toy", "textual-inversion", {}, {"<toy>": embeddings})


def test_files_hold_the_keys_that_other_tools_look_for_and_come_back(tmp_path: Path) -> None:
    one = token(text_encoder=rows(2, 768))
    two = token(text_encoder=rows(3, 768), text_encoder_2=rows(3, 1280))
    for adapter, keys, family in (
        (one, {"emb_params": (2, 768)}, "stable-diffusion-v1"),
        (token(text_encoder=rows(1, 1024)), {"emb_params": (1, 1024)}, "stable-diffusion-v1"),
        (two, {"clip_l": (3, 768), "clip_g": (3, 1280)}, "stable-diffusion-xl-v1-base"),
    ):
        path = save_adapter(adapter, tmp_path / "toy.safetensors", format="embedding", overwrite=True)
        assert {key: tuple(value.shape) for key, value in load_file(path).items()} == keys
        metadata = read_header(path).metadata
        assert metadata["studio.token"] == "<toy>"
        assert metadata["modelspec.architecture"] == f"{family}/textual-inversion"
        assert not any(key.startswith("ss_network") for key in metadata)
        again = load_adapter(path)
        assert (again.name, again.kind, again.changes) == ("toy", "textual-inversion", {})
        for component, tensor in adapter.tokens["<toy>"].items():
            assert torch.equal(again.tokens["<toy>"][component], tensor)


@pytest.mark.parametrize("model", ["short_sd", "tiny_sdxl"])
def test_diffusers_loads_a_file_of_ours_as_the_same_token(
    tmp_path: Path, request: pytest.FixtureRequest, model: str
) -> None:
    pipe, theirs = (request.getfixturevalue(model)() for _ in range(2))
    embeddings = {"text_encoder": rows(2, 32)}
    if model == "tiny_sdxl":
        embeddings["text_encoder_2"] = rows(2, 32) + 1
    path = save_adapter(token(**embeddings), tmp_path / "toy.safetensors", format="embedding")
    with AddedTokens(pipe, load_adapter(path, base=pipe).tokens):
        mine = encoded(pipe)
    theirs.tokenizer = deepcopy(theirs.tokenizer)
    if model == "short_sd":
        theirs.load_textual_inversion(path, token="<toy>")
    else:
        theirs.tokenizer_2 = deepcopy(theirs.tokenizer_2)
        held = load_file(path)
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            theirs.load_textual_inversion(
                held[key],
                token="<toy>",
                text_encoder=getattr(theirs, f"text_encoder{suffix}"),
                tokenizer=getattr(theirs, f"tokenizer{suffix}"),
            )
    wanted = encoded(theirs)
    pairs = [(one, other) for one, other in zip(mine, wanted, strict=True) if one is not None]
    assert pairs and all(torch.equal(one, other) for one, other in pairs)


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    vector = rows(768)
    save_file({"<cat-toy>": vector}, tmp_path / "learned_embeds.safetensors")
    (diffusers,) = load_adapter(tmp_path / "learned_embeds.safetensors").tokens.items()
    assert diffusers[0] == "<cat-toy>" and torch.equal(diffusers[1]["text_encoder"], vector[None])
    save_file({"emb_params": rows(2, 768).half()}, tmp_path / "EasyNegative.safetensors")
    (kohya,) = load_adapter(tmp_path / "EasyNegative.safetensors").tokens.items()
    assert kohya[0] == "EasyNegative" and torch.equal(kohya[1]["text_encoder"], rows(2, 768).half().float())
    save_file({"clip_g": rows(2, 1280), "clip_l": rows(2, 768)}, tmp_path / "xl.safetensors")
    (xl,) = load_adapter(tmp_path / "xl.safetensors").tokens.values()
    assert {name: tuple(value.shape) for name, value in xl.items()} == {
        "text_encoder": (2, 768),
        "text_encoder_2": (2, 1280),
    }


def test_what_is_no_embedding_or_for_another_base_is_refused(
    tmp_path: Path, short_sd: Factory, tiny_sdxl: Factory
) -> None:
    path = tmp_path / "toy.safetensors"
    for broken in (torch.zeros(2, 3, 4), torch.zeros(4, dtype=torch.int64), torch.tensor(1.0)):
        save_file({"emb_params": broken}, path)
        with pytest.raises(AdapterError, match=r"toy.safetensors is no embedding: 'emb_params' is torch"):
            load_adapter(path)
    save_file({"emb_params": torch.full((1, 32), float("nan"))}, path)
    with pytest.raises(AdapterError, match="NaN or infinite values in emb_params"):
        load_adapter(path)
    save_file({"emb_params": rows(1, 32)}, path)
    with pytest.raises(AdapterError, match="for text_encoder, the base model has text_encoder and text_enc"):
        load_adapter(path, base=tiny_sdxl())
    save_file({"emb_params": rows(1, 768)}, path)
    with pytest.raises(AdapterError, match=r"\[1, 768\] for text_encoder, the base model's are 32 wide"):
        load_adapter(path, base=short_sd())


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "embedding"])
def test_other_formats_hold_no_tokens(tmp_path: Path, form: str) -> None:
    with pytest.raises(AdapterError, match=r"cannot hold the new tokens of 'toy'. Save each by itself"):
        save_adapter(token(text_encoder=rows(1, 32)), tmp_path / "toy.safetensors", format=form)
    assert not list(tmp_path.iterdir())


def test_an_embedding_file_holds_one_token(tmp_path: Path) -> None:
    two = Adapter(
        "a", "textual-inversion", {}, {word: {"text_encoder": rows(1, 32)} for word in ("<a>", "<b>")}
    )
    with pytest.raises(AdapterError, match="holds one new token, got 2 and 0 changes"):
        save_adapter(two, tmp_path / "a.safetensors", format="embedding")
