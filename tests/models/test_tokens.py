"""New tokens act inside a block as diffusers' own loader makes them act, and leave nothing behind."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from studio.errors import AdapterError, UsageError
from studio.models.prompts import check_prompt
from studio.models.tokens import AddedTokens, TokenEmbedding, tokenizer_of

Factory = Callable[[], Any]


def rows_for(pipe: Any, vectors: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    return {name: torch.randn((vectors, 32), generator=generator) for name in encoders}


def encoded(pipe: Any, prompt: str) -> list[Tensor]:
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return [tensor for tensor in found if tensor is not None]


def state(pipe: Any) -> list[Any]:
    found: list[Any] = []
    for component in rows_for(pipe):
        encoder, tokenizer = getattr(pipe, component), tokenizer_of(pipe, component)
        found += [encoder.get_input_embeddings(), [p.numpy().tobytes() for p in encoder.parameters()]]
        found += [tokenizer, dict(vars(tokenizer)), len(tokenizer), tokenizer._tokenizer.to_str()]
        found += [[getattr(module, "eos_token_id", None) for module in encoder.modules()]]
    return found


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("model", ["short_sd", "tiny_sdxl"])
def test_prompt_embeddings_are_those_that_diffusers_makes_of_the_token(
    request: pytest.FixtureRequest, model: str, vectors: int
) -> None:
    pipe = request.getfixturevalue(model)()
    rows = rows_for(pipe, vectors)
    theirs = type(pipe)(**{name: deepcopy(part) for name, part in pipe.components.items()})
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    for component in rows:
        theirs.load_textual_inversion(
            {keys[component]: rows[component]},
            token="<toy>",
            text_encoder=getattr(theirs, component),
            tokenizer=tokenizer_of(theirs, component),
        )
    for prompt in ("a <toy> on a hill", "a hill", "<toy>, <toy>"):
        with AddedTokens(pipe, {"<toy>": rows}):
            mine = encoded(pipe, prompt)
        wanted = encoded(theirs, prompt)
        assert all(torch.equal(one, other) for one, other in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("model", ["short_sd", "tiny_sdxl"])
def test_nothing_is_left_behind_also_after_an_error(request: pytest.FixtureRequest, model: str) -> None:
    pipe = request.getfixturevalue(model)()
    plain = encoded(pipe, "a <toy>")
    # Taken after a call: a tokenizer keeps the length that it last cut texts to.
    before = state(pipe)
    with pytest.raises(RuntimeError, match="inside"), AddedTokens(pipe, {"<toy>": rows_for(pipe, 2)}):
        assert not torch.equal(encoded(pipe, "a <toy>")[0], plain[0])
        raise RuntimeError("inside")
    after = state(pipe)
    assert all(one is other or one == other for one, other in zip(before, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(encoded(pipe, "a <toy>"), plain, strict=True))


def test_pipelines_that_share_the_parts_know_the_token_too(short_sd: Factory) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = short_sd()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with AddedTokens(pipe, {"<toy>": rows_for(pipe)}):
        assert torch.equal(encoded(pipe, "a <toy>")[0], encoded(other, "a <toy>")[0])
        assert "<toy>" in other.tokenizer.tokenize("a <toy>")


def test_prompts_without_the_token_are_encoded_as_before(tiny_sdxl: Factory) -> None:
    pipe = tiny_sdxl()
    plain = encoded(pipe, "a hill")
    with AddedTokens(pipe, {"<toy>": rows_for(pipe)}):
        assert all(torch.equal(one, other) for one, other in zip(encoded(pipe, "a hill"), plain, strict=True))


def test_pooled_output_is_that_of_the_end_also_where_a_configuration_marks_it_the_old_way(
    tiny_sdxl: Factory,
) -> None:
    pipe, old = tiny_sdxl(), tiny_sdxl()
    rows, changed = rows_for(pipe), 0
    for module in old.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id, changed = 2, changed + 1
    assert changed
    before = state(old)
    pooled = []
    for each in (pipe, old):
        with AddedTokens(each, {"<toy>": rows}):
            pooled.append(encoded(each, "a <toy> on a hill")[1])
    assert torch.equal(*pooled)
    assert all(one is other or one == other for one, other in zip(before, state(old), strict=True))


def test_ids_that_are_free_below_the_encoders_size_are_the_new_tokens() -> None:
    own = torch.nn.Embedding(10, 4)
    rows = torch.arange(8.0).reshape(2, 4)
    taught = TokenEmbedding(own, rows, first=7)
    ids = torch.tensor([[6, 7, 8, 9]])
    expected = torch.stack([own.weight[6], rows[0], rows[1], own.weight[9]])
    assert torch.equal(taught(ids)[0], expected)
    with torch.no_grad():
        half = TokenEmbedding(own.half(), rows, first=7)(ids)
    assert half.dtype == torch.float16


def test_each_vector_of_a_token_counts_in_the_length_of_a_prompt(short_sd: Factory) -> None:
    pipe = short_sd()
    with AddedTokens(pipe, {"<toy>": rows_for(pipe, 60)}):
        check_prompt(pipe, "<toy> abcdefghijklmno")
        with pytest.raises(UsageError, match="the prompt has 78 tokens"):
            check_prompt(pipe, "<toy> abcdefghijklmnop")


def test_a_token_that_exists_is_refused(short_sd: Factory) -> None:
    pipe = short_sd()
    # The fixture's pipelines share theirs.
    pipe.tokenizer = deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens(["<there>_1"])
    for token, vectors in [("x", 1), ("<|endoftext|>", 1), ("<there>_1", 1), ("<there>", 2)]:
        with pytest.raises(
            UsageError, match=r"exists already in the base model's vocabulary. Choose one that"
        ):
            AddedTokens(pipe, {token: rows_for(pipe, vectors)})
    AddedTokens(pipe, {"<there>": rows_for(pipe, 1)})


@pytest.mark.parametrize("token", ["<Toy>", "My Toy", "ÉTÉ"])
def test_a_token_is_found_as_it_is_spelled_and_written_out_with_all_its_vectors(
    short_sd: Factory, token: str
) -> None:
    pipe = short_sd()
    with AddedTokens(pipe, {token: rows_for(pipe, 2)}):
        ids = pipe.tokenizer(pipe.maybe_convert_prompt(f"a {token}", pipe.tokenizer)).input_ids
    assert ids[-3:-1] == [514, 515]


def test_what_is_no_token_is_refused(short_sd: Factory, tiny_sdxl: Factory) -> None:
    pipe, xl = short_sd(), tiny_sdxl()
    with pytest.raises(UsageError, match="'' cannot be a token: the tokenizer does not read it as one"):
        AddedTokens(pipe, {"": rows_for(pipe)})
    with pytest.raises(AdapterError, match="for text_encoder, the base model has text_encoder and text_enc"):
        AddedTokens(xl, {"<toy>": rows_for(pipe)})
    with pytest.raises(AdapterError, match=r"\[1, 16\] for text_encoder, the base model's are 32 wide"):
        AddedTokens(pipe, {"<toy>": {"text_encoder": torch.zeros(1, 16)}})
    uneven = {"text_encoder": torch.zeros(1, 32), "text_encoder_2": torch.zeros(2, 32)}
    with pytest.raises(AdapterError, match="another number of vectors for each text encoder"):
        AddedTokens(xl, {"<toy>": uneven})
