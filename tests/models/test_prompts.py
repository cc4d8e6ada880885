"""Prompts that are too long are said, word for word."""

from copy import deepcopy
from typing import Any

import pytest

from studio.errors import UsageError
from studio.models.prompts import check_prompt


def test_a_prompt_that_just_fits_passes_and_one_token_more_does_not(tiny_sd: Any) -> None:
    pipe = tiny_sd()
    check_prompt(pipe, "")
    check_prompt(pipe, "x" * 75)
    with pytest.raises(UsageError, match=r"has 78 tokens .* takes 77: .* Shorten the prompt by 1 token"):
        check_prompt(pipe, "x" * 76)


def test_the_words_that_would_be_lost_are_named_whole(tiny_sd: Any) -> None:
    prompt = "y" * 63 + " in the Red garden with trees"
    with pytest.raises(UsageError, match='"garden with trees" would be lost'):
        check_prompt(tiny_sd(), prompt)


def test_the_text_encoder_may_take_less_than_the_tokenizer(tiny_sd: Any) -> None:
    pipe = tiny_sd()
    pipe.tokenizer = deepcopy(pipe.tokenizer)  # copies of a tiny pipeline share theirs
    pipe.tokenizer.model_max_length = 10**30
    check_prompt(pipe, "x" * 75)
    with pytest.raises(UsageError, match="takes 77"):
        check_prompt(pipe, "x" * 76)


def test_each_tokenizer_of_a_pipeline_is_asked_and_equal_answers_are_given_once(tiny_sdxl: Any) -> None:
    pipe = tiny_sdxl()
    with pytest.raises(UsageError) as raised:
        check_prompt(pipe, "x" * 80)
    assert str(raised.value).count("would be lost") == 1
    pipe.text_encoder_2.config.max_position_embeddings = 20
    with pytest.raises(UsageError, match="takes 20") as raised:
        check_prompt(pipe, "x" * 80)
    assert str(raised.value).count("would be lost") == 2


def test_a_trained_token_of_several_vectors_counts_as_many(tiny_sd: Any) -> None:
    pipe = tiny_sd()
    pipe.tokenizer = deepcopy(pipe.tokenizer)
    text = "x" * 73 + " <dog>"
    pipe.tokenizer.add_tokens(["<dog>"])
    check_prompt(pipe, text)
    pipe.tokenizer.add_tokens(["<dog>_1", "<dog>_2"])
    with pytest.raises(UsageError, match="has 78 tokens"):
        check_prompt(pipe, text)
