"""Weighted and long prompts are embedded chunk by chunk; plain ones to the pipeline's own bits."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from studio.errors import UsageError
from studio.models.prompt_encoding import reading_prompts
from studio.models.tokens import AddedTokens, text_encoders, tokenizer_of

# Of the tiny tokenizer every letter is a token.
LONG = "x " * 100
BASES = pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])


@pytest.fixture(scope="module")
def pipes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: request.getfixturevalue(name)() for name in ("tiny_sd", "tiny_sdxl")}


def encode(pipe: Any, prompt: Any, negative: Any = None, **more: Any) -> list[Tensor | None]:
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, **more}
    with torch.no_grad():
        return list(pipe.encode_prompt(prompt=prompt, negative_prompt=negative, **given))


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def by_hand(pipe: Any, chunks: Sequence[tuple[str, float]], start: int = 1) -> Tensor:
    """Return [1, tokens, width] for chunks that are one piece each, straight from the text encoders."""
    rows = []
    for component, encoder in text_encoders(pipe).items():
        tokenizer = tokenizer_of(pipe, component)
        parts = []
        for text, weight in chunks:
            ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
            length = len(tokenizer(text).input_ids)
            with torch.no_grad():
                found = encoder(ids, output_hidden_states=True)
            embedded = found.hidden_states[-2] if len(text_encoders(pipe)) > 1 else found[0]
            factor = torch.ones(77, dtype=torch.float64)
            factor[start : length - 1] = weight
            parts.append((embedded.double() * factor[:, None]).float())
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows, dim=-1)


@BASES
@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a fox", None), (["a fox", "x" * 75], ["", "bad"]), ("a fox", "bad"), (["a ] b:1)"], None)],
    ids=["one", "two", "negative", "odd"],
)
def test_plain_prompts_keep_the_pipelines_bits(
    pipes: dict[str, Any], model: str, prompt: Any, negative: Any
) -> None:
    own = encode(pipes[model], prompt, negative, num_images_per_prompt=2)
    with reading_prompts(pipes[model]):
        assert same(encode(pipes[model], prompt, negative, num_images_per_prompt=2), own)
    assert "encode_prompt" not in vars(pipes[model])


@BASES
def test_escaped_brackets_are_characters_and_raw_prompts_have_no_others(
    pipes: dict[str, Any], model: str
) -> None:
    own = encode(pipes[model], "a (red) [fox]")
    with reading_prompts(pipes[model]):
        assert same(encode(pipes[model], r"a \(red\) \[fox\]"), own)
        assert not same(encode(pipes[model], "a (red) [fox]"), own)
    with reading_prompts(pipes[model], raw=True):
        assert same(encode(pipes[model], "a (red) [fox]"), own)


@BASES
def test_a_words_embeddings_are_multiplied_by_its_weight_and_no_others(
    pipes: dict[str, Any], model: str
) -> None:
    pipe = pipes[model]
    plain = encode(pipe, ["a red fox", "a sea"], ["bad", "so bad"], num_images_per_prompt=2)
    with reading_prompts(pipe):
        found = encode(pipe, ["a (red:1.5) [fox]", "a sea"], ["(bad:0)", "so bad"], num_images_per_prompt=2)
    expected = [None if part is None else part.clone() for part in plain]
    assert expected[0] is not None and expected[1] is not None
    for picture in (0, 1):  # two of the first prompt come first
        expected[0][picture, 2:5] *= 1.5
        expected[0][picture, 5:8] *= torch.tensor(1 / 1.1)
        expected[1][picture, 1:4] = 0
    assert same(found, expected)


@BASES
def test_long_prompts_are_chunks_one_after_the_other(pipes: dict[str, Any], model: str) -> None:
    pipe = pipes[model]
    with reading_prompts(pipe):
        found = encode(pipe, [f"({LONG}:1.2) BREAK", "a fox"], ["bad", "BREAK worse"])
    assert found[0] is not None and found[1] is not None
    rows = [
        by_hand(pipe, [("x " * 75, 1.2), ("x " * 25, 1.2), ("", 1)]),
        by_hand(pipe, [("a fox", 1), ("", 1), ("", 1)]),
    ]
    close = {"rtol": 1e-5, "atol": 1e-6}  # batches of other sizes sum in other orders
    torch.testing.assert_close(found[0], torch.cat(rows), **close)
    negatives = [
        by_hand(pipe, [("bad", 1), ("", 1), ("", 1)]),
        by_hand(pipe, [("", 1), ("worse", 1), ("", 1)]),
    ]
    torch.testing.assert_close(found[1], torch.cat(negatives), **close)
    if model == "tiny_sdxl":
        first = encode(pipe, ["x " * 75, "a fox"], ["bad", ""])
        torch.testing.assert_close(found[2:], first[2:], **close)


def test_sd2_fills_its_chunks_with_its_own_token(pipes: dict[str, Any]) -> None:
    # SD 2.x has one encoder; its tokenizer fills with "!", not with the end.
    pipe = pipes["tiny_sd"]
    tokenizer = deepcopy(pipe.tokenizer)
    tokenizer.pad_token = "!"
    second = type(pipe)(**{**pipe.components, "tokenizer": tokenizer}, requires_safety_checker=False)
    own = encode(second, "a fox", num_images_per_prompt=2)
    with reading_prompts(second):
        assert same(encode(second, "a fox", num_images_per_prompt=2), own)
        found = encode(second, "x" * 80)[0]
    letter, fill = tokenizer("xx", add_special_tokens=False).input_ids[0], tokenizer.pad_token_id
    last = tokenizer("x", add_special_tokens=False).input_ids
    assert fill != 513 and found is not None
    rows = torch.tensor([[512, *[letter] * 75, 513], [512, *[letter] * 4, *last, 513, *[fill] * 70]])
    with torch.no_grad():
        expected = pipe.text_encoder(rows)[0]
    torch.testing.assert_close(found[0], expected.flatten(0, 1))


def test_a_negative_prompt_that_is_not_given_is_what_the_pipeline_makes_of_it(pipes: dict[str, Any]) -> None:
    for pipe in pipes.values():
        with reading_prompts(pipe):
            found = encode(pipe, LONG)
            assert encode(pipe, LONG, LONG * 2, do_classifier_free_guidance=False)[1] is None
            # Without guidance a longer negative prompt changes nothing.
            unguided = encode(pipe, LONG, LONG * 2, do_classifier_free_guidance=False)[0]
        assert found[0] is not None and unguided is not None and found[0].shape[1] == 154
        torch.testing.assert_close(unguided, found[0])
        own = encode(pipe, "a fox")[1]
        assert own is not None and found[1] is not None and torch.equal(found[1], own.repeat(1, 2, 1))


def test_sdxls_second_text_may_be_another(pipes: dict[str, Any]) -> None:
    pipe = pipes["tiny_sdxl"]
    plain = encode(pipe, "a red fox", prompt_2="a sea")[0]
    with reading_prompts(pipe):
        found = encode(pipe, "a (red:2) fox", prompt_2="a (sea:3)")[0]
    assert plain is not None and found is not None
    plain[:, 2:5, :32] *= 2
    plain[:, 2:5, 32:] *= 3
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("x" * 60 + "," + "y" * 30, ("x" * 60 + ",", "y" * 30)),
        ("x" * 54 + "," + "y" * 30, ("x" * 54 + "," + "y" * 20, "y" * 10)),
        ("x" * 55 + "," + "y" * 30, ("x" * 55 + ",", "y" * 30)),
        ("x" * 70 + ",y," + "z" * 10, ("x" * 70 + ",y,", "z" * 10)),
    ],
    ids=["comma", "comma-too-far", "last-that-counts", "of-two-the-last"],
)
def test_a_chunk_ends_at_a_comma_near_its_end(
    pipes: dict[str, Any], prompt: str, chunks: tuple[str, str]
) -> None:
    pipe = pipes["tiny_sd"]
    with reading_prompts(pipe) as reader:
        found = encode(pipe, prompt)[0]
        assert reader.num_chunks(prompt) == 2
    ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    size = len(pipe.tokenizer(chunks[0], add_special_tokens=False).input_ids)
    assert found is not None
    for place, part in enumerate((ids[:size], ids[size:])):
        row = [512, *part, 513, *[513] * (75 - len(part))]
        with torch.no_grad():
            expected = pipe.text_encoder(torch.tensor([row]))[0]
        torch.testing.assert_close(found[:, 77 * place : 77 * (place + 1)], expected)


def test_the_vectors_of_a_token_stay_together(pipes: dict[str, Any]) -> None:
    pipe = pipes["tiny_sd"]
    rows = torch.randn((3, 32), generator=torch.Generator().manual_seed(0))
    with AddedTokens(pipe, {"<toy>": {"text_encoder": rows}}), reading_prompts(pipe) as reader:
        first = pipe.tokenizer.convert_tokens_to_ids("<toy>")
        found = encode(pipe, "x" * 73 + " (<toy>:2)")[0]
        assert reader.num_rows("x" * 73 + " <toy>") == 77 + 5
        with torch.no_grad():
            row = [512, first, first + 1, first + 2, *[513] * 73]
            expected = pipe.text_encoder(torch.tensor([row]))[0]
    assert found is not None
    expected[:, 1:4] *= 2
    torch.testing.assert_close(found[:, 77:], expected)


def test_prompts_are_counted_in_chunks_and_rows(pipes: dict[str, Any]) -> None:
    for pipe in pipes.values():
        with reading_prompts(pipe) as reader:
            texts = ["", "x" * 75, "x" * 76, "a BREAK b", "(x:2)"]
            assert [reader.num_chunks(text) for text in texts] == [1, 1, 2, 2, 1]
            assert [reader.num_rows(text) for text in texts] == [2, 77, 80, 80, 3]


def test_embeddings_made_elsewhere_do_not_mix_with_weights(pipes: dict[str, Any]) -> None:
    pipe = pipes["tiny_sd"]
    made = encode(pipe, "bad")[0]
    with reading_prompts(pipe):
        assert same(encode(pipe, None, prompt_embeds=made), encode(pipe, "bad"))
        encode(pipe, "a fox", negative_prompt_embeds=made)
        with pytest.raises(UsageError, match="Give all prompts as text"):
            encode(pipe, "a (fox)", negative_prompt_embeds=made)


def test_half_precision_is_rounded_once(pipes: dict[str, Any]) -> None:
    pipe = pipes["tiny_sd"]
    half = type(pipe)(**{**pipe.components, "text_encoder": deepcopy(pipe.text_encoder).bfloat16()},
                      requires_safety_checker=False)  # fmt: skip
    plain = encode(half, "a fox")[0]
    with reading_prompts(half):
        found = encode(half, "(a fox:1.3)")[0]
    assert plain is not None and found is not None and found.dtype == torch.bfloat16
    expected = plain.float()
    expected[:, 1:5] *= torch.tensor(1.3)
    assert torch.equal(found, expected.bfloat16())
