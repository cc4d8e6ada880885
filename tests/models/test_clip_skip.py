"""Prompts read from an earlier layer of the text encoder, then normed, as A1111 and kohya do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from studio.errors import UsageError
from studio.models.clip_skip import check_clip_skip, clip_skip_of, clip_skipped
from studio.models.prompt_encoding import reading_prompts


def encoded(pipe: Any, prompt: str) -> Tensor:
    with torch.no_grad(), reading_prompts(pipe):
        found: Tensor = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]
    return found


def test_prompts_are_the_earlier_layers_output_with_the_final_norm(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    long, plain = "x " * 80, encoded(pipe, "a fox")
    ids = pipe.tokenizer("a fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        wanted = pipe.text_encoder.final_layer_norm(layers[-2])
    with clip_skipped(pipe, 2):
        assert clip_skip_of(pipe) == 2
        assert torch.allclose(encoded(pipe, "a fox"), wanted, atol=1e-6)  # fp32
        chunked = encoded(pipe, long)
    assert clip_skip_of(pipe) == 1 and torch.equal(encoded(pipe, "a fox"), plain)
    assert chunked.shape[1] == 154 and not torch.equal(chunked, encoded(pipe, long))


def test_what_cannot_be_skipped_is_refused(tiny_sd: Callable[[], Any], tiny_sdxl: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="must be at most 2, the text encoder's layers, got 3"):
        check_clip_skip(tiny_sd(), 3)
    with pytest.raises(UsageError, match=r"SDXL always reads the layer before the last.*got 2\. Leave clip"):
        check_clip_skip(tiny_sdxl(), 2)
