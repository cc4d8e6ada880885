"""Plan modifiers on any method and on none: what they save, and that they do nothing else."""

from typing import Any

import pytest
import torch

from studio.composition.engine import compose
from studio.composition.methods.composite import Composite
from studio.composition.methods.merge import Merge
from studio.composition.methods.switch import Switch
from studio.composition.modifiers.cache import Cache
from studio.composition.modifiers.skip_guidance import SkipGuidance
from studio.composition.plan import Step
from studio.errors import CompositionError, UsageError

NONE = {"full_first": 0, "full_last": 0}


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any) -> dict[str, Any]:
    return {"one": make_adapter(sd, 1), "two": make_adapter(sd, 2)}


def steps(total: int) -> list[Step]:
    return [Step(index, total, index / total) for index in range(total)]


@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_a_cache_of_interval_1_changes_no_bit(method: str, sd: Any, pair: Any, draw: Any) -> None:
    drawn = []
    options = {"switch_every": 1} if method == "switch" else {}
    for modifiers in ({}, {"cache": {"interval": 1}}):
        with compose(sd, pair, method=method, options=options, modifiers=modifiers) as composition:
            drawn.append(draw(sd, steps=2))
            assert composition.passes.shallow == 0
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("adapters", "branches"), [((), 1), (("one", "two"), 2)], ids=["base", "two"])
def test_a_cache_computes_the_deep_layers_in_every_third_step(
    adapters: tuple[str, ...], branches: int, sd: Any, pair: Any, draw: Any
) -> None:
    given = {name: pair[name] for name in adapters}
    method = "composite" if adapters else "merge"
    plain = draw(sd, steps=7)
    with compose(sd, given, method=method, modifiers={"cache": {"interval": 3, **NONE}}) as composition:
        draw(sd, steps=7)
        first = draw(sd, steps=7)
        assert not torch.equal(first, plain)
    # Steps 0, 3 and 6 of two runs; guidance doubles the rows.
    assert (composition.passes.full, composition.passes.shallow) == (
        2 * 3 * 2 * branches,
        2 * 4 * 2 * branches,
    )
    with compose(sd, given, method=method, modifiers={"cache": {"interval": 3, **NONE}}):
        assert torch.equal(draw(sd, steps=7), first)


def test_the_first_and_the_last_steps_are_computed_whole() -> None:
    plan = Cache(Cache.Options(interval=4)).modify(Merge().prepare({}, {}), {}, {})
    assert [plan.at(step)[0].reuse for step in steps(12)] == [0, 0, 3, 3, 0, 3, 3, 3, 0, 3, 0, 0]


def test_features_are_never_another_adapters(sd: Any, pair: Any, draw: Any) -> None:
    modifiers = {"cache": {"interval": 2, **NONE}}
    with compose(
        sd, pair, method="switch", options={"switch_every": 1}, modifiers=modifiers, weights={"one": 0.5}
    ) as composition:
        draw(sd, steps=6)
    # Each adapter's own features are two steps old when its turn comes again.
    assert composition.passes.shallow == 0


def test_merged_weights_of_a_cached_run_are_in_the_shallow_part_too(sd: Any, pair: Any, draw: Any) -> None:
    """The features of a run are forgotten at its end."""
    modifiers = {"cache": {"interval": 9, **NONE}}
    with compose(sd, pair, modifiers=modifiers) as composition:
        draw(sd, steps=2, seed=0)
        draw(sd, steps=2, seed=1)
    assert (composition.passes.full, composition.passes.shallow) == (4, 4)


def test_a_heun_step_takes_its_second_call_from_its_first_when_it_may(sd: Any, draw: Any) -> None:
    from studio.models.schedulers import make_scheduler

    before = sd.scheduler
    sd.scheduler = make_scheduler(sd, "heun")
    try:
        with compose(sd, {}, modifiers={"cache": {"interval": 2, **NONE}}) as composition:
            draw(sd, steps=4)
    finally:
        sd.scheduler = before
    # Seven calls for four steps, whose last has one: both calls of steps 0 and 2 are whole.
    assert (composition.passes.full, composition.passes.shallow) == (2 * 4, 2 * 3)


def test_skipped_guidance_is_the_conditional_answer_and_half_the_rows(sd: Any, pair: Any, draw: Any) -> None:
    with compose(sd, pair):
        unguided = draw(sd, steps=4, guidance_scale=1.0)
        guided = draw(sd, steps=4)
    for start, wanted, rows in ((0.0, unguided, 4), (0.5, None, 6)):
        with compose(sd, pair, modifiers={"skip-guidance": {"start": start}}) as composition:
            got = draw(sd, steps=4)
        assert composition.passes.full == rows
        if wanted is None:
            assert not torch.allclose(got, guided, atol=1e-4) and not torch.allclose(got, unguided, atol=1e-4)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_modifiers_stand_on_each_other_in_their_order(sd: Any, pair: Any, draw: Any) -> None:
    modifiers = {"skip-guidance": {"start": 0.5}, "cache": {"interval": 2, **NONE}}
    with compose(sd, pair, method="composite", modifiers=modifiers) as composition:
        draw(sd, steps=4)
    # Two adapters: 4 full rows, 4 shallow, then 2 and 2 without guidance.
    assert (composition.passes.full, composition.passes.shallow) == (6, 6)


def test_a_modifier_leaves_the_plans_own_promises() -> None:
    inner = Switch(Switch.Options(switch_every=5)).prepare({"a": None, "b": None}, {"a": 1.0, "b": 0.5})
    for modifier in (Cache(), SkipGuidance()):
        plan = modifier.modify(inner, {}, {})
        assert plan.describe(10) == inner.describe(10) and plan.text_weights == inner.text_weights
        with pytest.raises(CompositionError, match="would never have a turn"):
            plan.check(5)


def test_texts_and_regions_come_along() -> None:
    inner = Composite(Composite.Options(text_encoder_policy="own")).prepare({"a": None}, {"a": 1.0})
    plan = Cache().modify(inner, {}, {})
    assert plan.texts == inner.texts and plan.at(steps(3)[0])[0].text == "a"


def test_a_modifier_that_does_nothing_in_a_run_is_said_once(
    sd: Any, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    modifiers = {"cache": {"interval": 7, "full_first": 3}, "skip-guidance": {"start": 0.9}}
    with compose(sd, {}, modifiers=modifiers):
        for _ in range(2):
            draw(sd, steps=3)
    skipping, caching = [record.getMessage() for record in caplog.records]
    assert caching.startswith("cache: all 3 steps of this run are computed whole, with interval 7, ")
    assert "from 0 to 0.667 of the schedule, lies between start 0.9 and end 1" in skipping
    plan = Cache(Cache.Options(interval=9)).modify(Merge().prepare({}, {}), {}, {})
    assert "interval 9, what the first" in next(plan.without_effect(steps(9)))
    assert not list(plan.without_effect(steps(10)))


@pytest.mark.parametrize(
    ("modifiers", "error", "says"),
    [
        ({"cash": {}}, UsageError, "Did you mean 'cache'"),
        ({"cache": {"interval": 0}}, UsageError, "interval"),
        ({"skip-guidance": {"start": 0.9, "end": 0.2}}, CompositionError, "start must be below end"),
    ],
)
def test_a_wrong_modifier_is_said(modifiers: Any, error: Any, says: str, sd: Any) -> None:
    with pytest.raises(error, match=says):
        compose(sd, {}, modifiers=modifiers)
