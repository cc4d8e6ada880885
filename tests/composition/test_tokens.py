"""New tokens inside a composition: known there, gone afterwards, and no part of any plan."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.composition.engine import compose
from studio.composition.plan import Step
from studio.errors import AdapterError, CompositionError, UsageError

Factory = Callable[[], Any]


def token(word: str = "<toy>", vectors: int = 1, encoders: tuple[str, ...] = ("text_encoder",)) -> Adapter:
    generator = torch.Generator().manual_seed(vectors)
    rows = {name: torch.randn((vectors, 32), generator=generator) for name in encoders}
    return Adapter("toy", "textual-inversion", {}, {word: rows})


@pytest.mark.parametrize("model", ["short_sd", "short_sdxl"])
def test_a_token_acts_in_prompts_inside_the_block_alone(
    request: pytest.FixtureRequest, draw: Any, snapshot: Any, model: str
) -> None:
    pipe = request.getfixturevalue(model)()
    encoders = ("text_encoder", "text_encoder_2") if model == "short_sdxl" else ("text_encoder",)
    plain, named = draw(pipe, prompt="a fox"), draw(pipe, prompt="a <toy>")
    # Taken after a call: a tokenizer keeps the length that it last cut texts to.
    before, known = snapshot(pipe), pipe.tokenizer._tokenizer.to_str()
    with pytest.raises(KeyError), compose(pipe, {"toy": token(vectors=2, encoders=encoders)}):
        assert torch.equal(draw(pipe, prompt="a fox"), plain)
        assert not torch.equal(draw(pipe, prompt="a <toy>"), named)
        assert "<toy>_1" in pipe.tokenizer.get_vocab()
        raise KeyError
    after = snapshot(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert pipe.tokenizer._tokenizer.to_str() == known
    assert torch.equal(draw(pipe, prompt="a <toy>"), named)


def test_an_adapter_with_changes_and_a_token_acts_as_the_two_together(
    short_sd: Factory, make_adapter: Any, draw: Any
) -> None:
    pipe = short_sd()
    style, toy = make_adapter(pipe, 1, text=True), token()
    with compose(pipe, {"style": style, "toy": toy}, weights={"style": 0.5}):
        apart = draw(pipe, prompt="a <toy>")
    with compose(pipe, {"both": replace(style, tokens=toy.tokens)}, weights={"both": 0.5}):
        together = draw(pipe, prompt="a <toy>")
    assert torch.equal(apart, together)


def test_a_token_takes_no_turn_of_switch(short_sd: Factory, make_adapter: Any) -> None:
    pipe = short_sd()
    adapters = {"one": make_adapter(pipe, 1), "toy": token(), "two": make_adapter(pipe, 2)}
    plan = compose(pipe, adapters, method="switch", options={"switch_every": 1}).plan
    acting = [set(plan.at(Step(index, 4, index / 4))[0].weights) for index in range(4)]
    assert acting == [{"one"}, {"two"}, {"one"}, {"two"}]


def test_what_tokens_cannot_do_is_refused_before_anything_is_touched(
    short_sd: Factory, short_sdxl: Factory, make_adapter: Any
) -> None:
    pipe = short_sd()
    with pytest.raises(UsageError, match=r"'toy' is the token <toy>, which has no strength.*got 0.5"):
        compose(pipe, {"toy": token()}, weights={"toy": 0.5})
    with pytest.raises(CompositionError, match="'other' brings the token <toy>, as another adapter does"):
        compose(pipe, {"toy": token(), "other": token()})
    with pytest.raises(UsageError, match="the token 'x' exists already"):
        compose(pipe, {"toy": token("x")})
    with pytest.raises(AdapterError, match="has embeddings for text_encoder, the base model has"):
        compose(short_sdxl(), {"toy": token()})
    with pytest.raises(CompositionError, match="method 'switch' got no adapters"):
        compose(pipe, {"toy": token()}, method="switch")
    assert "<toy>" not in pipe.tokenizer.get_vocab()


def test_pipelines_that_share_a_tokenizer_do_not_take_each_others_token(short_sd: Factory) -> None:
    one, other = short_sd(), short_sd()
    assert one.tokenizer is other.tokenizer
    with (
        compose(one, {"toy": token()}),
        pytest.raises(UsageError, match="the token '<toy>' exists already"),
    ):
        compose(other, {"toy": token()})
    first, second = compose(one, {"toy": token()}), compose(other, {"toy": token()})
    with first, pytest.raises(CompositionError, match="is in another composition"):
        second.__enter__()
    assert "<toy>" not in one.tokenizer.get_vocab()
