"""Pinned adapters act in every branch of every method and wherever a prompt is encoded."""

from typing import Any

import pytest
import torch

from studio.composition.engine import compose
from studio.composition.methods.composite import Composite
from studio.composition.methods.merge import Merge
from studio.composition.methods.switch import Switch
from studio.composition.modifiers.pin import Pin
from studio.composition.modifiers.skip_guidance import SkipGuidance
from studio.composition.plan import BaseInfo, Composer, Plan, Step
from studio.composition.planner import Planner
from studio.errors import CompositionError

BASE = BaseInfo("sd1", {})
WEIGHTS = {"fox": 0.8, "safety": 0.6, "ink": 1.2}


def pinned(composer: Composer, *names: str, more: tuple[Any, ...] = ()) -> Plan:
    pin = Pin(Pin.Options(adapters=names))
    return Planner(composer, (*more, pin), dict.fromkeys(WEIGHTS), WEIGHTS, BASE).plan()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "composer",
    [
        Merge(),
        Switch(Switch.Options(switch_every=1)),
        Switch(Switch.Options(text_encoder_policy="base")),
        Composite(),
        Composite(Composite.Options(shared_unconditional=True, text_encoder_policy="own")),
    ],
    ids=["merge", "switch", "switch-base", "composite", "composite-own"],
)
def test_a_pinned_adapter_is_in_every_branch_and_text(composer: Composer) -> None:
    plan = pinned(composer, "safety", more=(SkipGuidance(),))
    for index in range(8):
        branches = plan.at(Step(index, 8, index / 8))
        assert branches and all(branch.weights["safety"] == 0.6 for branch in branches)
    assert plan.text_weights["safety"] == 0.6
    assert all(text.weights["safety"] == 0.6 for text in plan.texts.values())


def test_the_method_does_not_see_a_pinned_adapter() -> None:
    plan = pinned(Switch(Switch.Options(switch_every=1)), "safety")
    rows = {row.adapter: row.weights for row in plan.describe(4)}
    assert rows == {"fox": (0.8, 0, 0.8, 0), "ink": (0, 1.2, 0, 1.2), "safety": (0.6,) * 4}


def test_everything_else_of_the_plan_stays() -> None:
    plan = pinned(Composite(Composite.Options(shares={"fox": 3.0})), "safety")
    assert plan.constant
    assert [branch.share for branch in plan.at(Step(0, 1, 0.0))] == [0.75, 0.25]
    short = pinned(Switch(Switch.Options(switch_every=5)), "safety")
    assert not short.constant
    with pytest.raises(CompositionError, match="never have a turn"):
        short.check(5)


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(CompositionError, match=r"pin: unknown adapter 'safty'. Did you mean 'safety'"):
        pinned(Merge(), "safty")
    with pytest.raises(CompositionError, match="'switch' got no adapters"):
        pinned(Switch(), *WEIGHTS)
    plan = Merge().prepare(dict.fromkeys(WEIGHTS), WEIGHTS)  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match=r"called 'fox' of its own. Give the pinned one another name"):
        Pin(Pin.Options(adapters=("fox",))).modify(plan, dict.fromkeys(WEIGHTS), WEIGHTS)  # type: ignore[arg-type]


def test_in_a_run_the_pinned_adapter_is_in_the_weights_at_every_step(
    short_sd: Any, make_adapter: Any, draw: Any, summed: Any, watch: Any, target: Any, parameter: Any
) -> None:
    pipe, name = short_sd(), target["linear"]
    adapters = {
        each: make_adapter(pipe, seed, targets=[name], text=True)
        for seed, each in enumerate(("fox", "ink", "safety"))
    }
    safety = (adapters["safety"], 0.5)
    wanted = [summed(pipe, [(adapters[each], 1.0), safety], name).float() for each in ("fox", "ink")]
    spoken = summed(
        pipe, [(one, 0.5 if key == "safety" else 1.0) for key, one in adapters.items()], target["text"]
    )
    with compose(
        pipe,
        adapters,
        method="switch",
        options={"switch_every": 1},
        weights={"safety": 0.5},
        modifiers={"pin": {"adapters": ["safety"]}},
    ):
        seen, hook = watch(pipe, name)
        draw(pipe, steps=4)
        hook.remove()
        torch.testing.assert_close(parameter(pipe, target["text"]).double(), spoken, rtol=1e-6, atol=1e-6)
    for index, value in enumerate(seen):
        torch.testing.assert_close(value, wanted[index % 2], rtol=1e-6, atol=1e-6)  # one rounding to fp32
    assert len(seen) == 4
