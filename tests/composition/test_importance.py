"""W-Switch and W-Composite: what the prompt says decides who acts how long and how much."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from studio.composition.engine import compose
from studio.composition.importance import by_ablation, by_similarity
from studio.composition.methods.w_switch import WSwitch, turns
from studio.composition.plan import Request, Step
from studio.errors import CompositionError


def embed(text: str) -> torch.Tensor:
    """Return a vector for each word and their sum at the end, as a text encoder's last token has them all."""
    vectors = {"a": 0, "sks": 1, "fox": 2, "ink": 3}
    rows = torch.stack([torch.eye(4)[vectors[word]] for word in text.split()] or [torch.zeros(4)])
    return torch.cat([rows, rows.sum(0, keepdim=True)])


REQUEST = Request("a sks sks fox ink", embed=embed)
TRIGGERS = {"fox": "sks", "style": "ink", "other": "ball"}


def test_importance_by_ablation_is_what_the_embedding_loses() -> None:
    found = by_ablation(TRIGGERS, REQUEST)
    whole = torch.tensor([1.0, 2.0, 1.0, 1.0])
    cosine = torch.nn.functional.cosine_similarity
    without = {"fox": torch.tensor([1.0, 0, 1, 1]), "style": torch.tensor([1.0, 2, 1, 0])}
    for name, vector in without.items():
        assert found[name] == pytest.approx(1 - float(cosine(whole, vector, dim=0)), abs=1e-6)
    assert found["other"] == pytest.approx(0, abs=1e-6) and found["fox"] > found["style"] > 0


def test_importance_by_similarity_is_the_cosine_and_a_batch_has_the_mean() -> None:
    words = {"fox": "sks", "style": "ink"}
    one, both = by_similarity(words, REQUEST), by_similarity(words, replace(REQUEST, others=("a ink",)))
    assert one["fox"] == pytest.approx(2 / 7**0.5) and one["style"] == pytest.approx(1 / 7**0.5)
    assert both["style"] == pytest.approx((1 / 7**0.5 + 1 / 2**0.5) / 2)


@pytest.mark.parametrize("importance", [[1, 1, 1], [9, 1, 0], [0, 0, 0], [0.3, 0.3, 0.4], [1e-9, 5, 1]])
def test_turns_fill_the_cycle_and_leave_nobody_out(importance: list[float]) -> None:
    found = turns(importance, 15)
    assert sum(found) == 15 and min(found) >= 1
    for one, other in itertools.permutations(range(3), 2):
        assert importance[one] <= importance[other] or found[one] >= found[other]
    assert len(set(importance)) > 1 or found == (5, 5, 5)


def test_the_last_steps_are_the_final_adapters() -> None:
    options = WSwitch.Options(
        switch_every=2, triggers={"fox": "sks", "style": "ink"}, final="style", final_steps=3
    )
    plan = WSwitch(options).prepare({"fox": None, "style": None}, {"fox": 1.0, "style": 1.0}, None, REQUEST)
    acting = [plan.active(Step(index, 12, index / 12)) for index in range(12)]
    assert plan.turns == (3, 1)
    assert acting == ["fox", "fox", "fox", "style"] * 2 + ["fox"] + ["style"] * 3


@pytest.mark.parametrize("method", ["w-switch", "w-composite"])
def test_the_pipelines_prompt_decides(method: str, short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    pair = {
        name: replace(make_adapter(pipe, seed), metadata={"modelspec.trigger_phrase": words})
        for name, seed, words in (("one", 1, "sks fox"), ("two", 2, "ink"))
    }
    options = {"switch_every": 2, "final_steps": 1} if method == "w-switch" else {}
    with compose(pipe, pair, method=method, options=options) as composition:
        even = composition.plan
        found = []
        for prompt in ("a sks fox", "a drawing in ink", "a sks fox"):
            picture = draw(pipe, steps=8, prompt=prompt)
            found.append((composition.plan, picture))
    if method == "w-switch":
        assert even.turns == (2, 2) and found[0][0].turns == (3, 1) and found[1][0].turns == (1, 3)
    else:
        assert [branch.share for branch in even.branches] == [0.5, 0.5]
        shares = [plan.branches[0].share for plan, _ in found]
        assert shares[0] == shares[2] != shares[1]
    assert torch.equal(found[0][1], found[2][1]) and not torch.equal(found[0][1], found[1][1])


def test_unknown_trigger_words_are_said(short_sd: Any, make_adapter: Any) -> None:
    pipe = short_sd()
    pair = {"one": make_adapter(pipe, 1)}
    with pytest.raises(CompositionError, match="trigger words of 'one' are not known"):
        compose(pipe, pair, method="w-switch")
    with pytest.raises(CompositionError, match="unknown adapter 'six'"):
        compose(pipe, pair, method="w-composite", options={"triggers": {"one": "a", "six": "b"}})
    with pytest.raises(CompositionError, match="final: unknown adapter 'six'"):
        compose(pipe, pair, method="w-switch", options={"triggers": {"one": "a"}, "final": "six"})
