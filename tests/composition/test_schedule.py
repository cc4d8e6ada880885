"""Weights that change along the run."""

from typing import Any

import numpy
import pytest
import torch

from studio.composition.engine import compose
from studio.composition.methods.composite import Composite
from studio.composition.methods.merge import Merge
from studio.composition.methods.switch import Switch
from studio.composition.modifiers.schedule import Schedule
from studio.composition.plan import Composer, Plan, Step
from studio.composition.shaped import read_curve, value_at
from studio.errors import CompositionError, SpecError
from studio.specs import parse_spec

WEIGHTS = {"fox": 0.8, "ink": 1.5}


def scheduled(curves: Any, composer: Composer | None = None) -> Plan:
    plan = (composer or Merge()).prepare(dict.fromkeys(WEIGHTS), WEIGHTS)  # type: ignore[arg-type]
    options = parse_spec(Schedule.Options, {"weights": curves})
    return Schedule(options).modify(plan, dict.fromkeys(WEIGHTS), WEIGHTS)  # type: ignore[arg-type]


def test_a_curve_is_linear_between_its_points_and_level_outside() -> None:
    points = [[0.1, 0.0], [0.3, 1.0], [0.8, -0.5]]
    curve = read_curve(points)
    for place in numpy.linspace(0, 1, 101):
        wanted = numpy.interp(place, [0.1, 0.3, 0.8], [0.0, 1.0, -0.5])
        assert value_at(curve, float(place)) == pytest.approx(wanted)


def test_two_points_at_one_place_make_a_jump_to_the_later_one() -> None:
    curve = read_curve("1@0, 1@0.5, 0@0.5, 0@1")
    assert [value_at(curve, place) for place in (0.0, 0.49, 0.5, 0.9)] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.5, 0.5),
        (2, 2.0),
        ("0.5", 0.5),
        ("0@0,1@0.3", ((0.0, 0.0), (0.3, 1.0))),
        (" 0@0 1@0.3 ", ((0.0, 0.0), (0.3, 1.0))),
        ([[0, 0], [0.3, 1]], ((0.0, 0.0), (0.3, 1.0))),
        ([[0, 1], [1, 1]], 1.0),
    ],
    ids=str,
)
def test_a_curve_is_read_from_every_spelling(given: Any, wanted: Any) -> None:
    assert read_curve(given) == wanted
    assert read_curve(read_curve(given)) == wanted


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("0@0, 1", "a curve is a number, points"),
        ([], "a curve is a number, points"),
        ([0, 1], "a curve is a number, points"),
        ("1@2", "between 0 and 1"),
        ("inf@0", "finite numbers"),
        (float("nan"), "finite numbers"),
        ("0@0.5, 1@0.2", "ascending order"),
        ("fast", "'fast' is no number"),
        (True, "'True' is no number"),
        (None, "'None' is no number"),
    ],
    ids=str,
)
def test_what_is_no_curve_is_refused(given: Any, problem: str) -> None:
    with pytest.raises(SpecError, match=f"weights.fox: .*{problem}"):
        scheduled({"fox": given})


def test_a_schedule_multiplies_the_adapters_weight_and_leaves_the_others() -> None:
    plan = scheduled({"fox": [[0, 0], [0.5, 1], [1, 0.5]]})
    rows = {row.adapter: row.weights for row in plan.describe(4)}
    assert rows["fox"] == pytest.approx((0.0, 0.4, 0.8, 0.6))
    assert rows["ink"] == (1.5,) * 4
    assert plan.text_weights == WEIGHTS
    assert not plan.constant


def test_image_to_image_starts_inside_the_curve() -> None:
    plan = scheduled({"fox": "0@0 1@1"})
    assert plan.at(Step(0, 5, 0.5))[0].weights["fox"] == pytest.approx(0.4)


def test_a_schedule_works_under_any_method() -> None:
    curve = {"fox": "0@0, 1@1"}
    switched = scheduled(curve, Switch(Switch.Options(switch_every=1))).describe(4)
    assert [row.weights for row in switched] == [pytest.approx((0, 0, 0.4, 0)), (0, 1.5, 0, 1.5)]
    composite = scheduled(curve, Composite())
    assert [branch.weights for branch in composite.at(Step(1, 2, 0.5))] == [{"fox": 0.4}, {"ink": 1.5}]


def test_a_level_schedule_leaves_the_plan_constant() -> None:
    plan = scheduled({"fox": [[0, 0.5], [1, 0.5]]})
    assert plan.constant
    assert plan.at(Step(0, 1, 0.0))[0].weights == {"fox": 0.4, "ink": 1.5}


def test_a_schedule_for_nobody_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"schedule: 'cat' is none of .*: fox, ink. Name one of these"):
        scheduled({"cat": 1})


def test_in_a_run_each_step_has_its_own_weight(
    short_sd: Any, make_adapter: Any, draw: Any, summed: Any, watch: Any, target: Any, parameter: Any
) -> None:
    pipe, name = short_sd(), target["linear"]
    adapter = make_adapter(pipe, 1, targets=[name])
    before = parameter(pipe, name).clone()
    wanted = [summed(pipe, [(adapter, weight)], name).float() for weight in (0.0, 0.5, 1.0, 0.75)]
    schedule = {"weights": {"fox": [[0, 0], [0.5, 1], [1, 0.5]]}}
    with compose(pipe, {"fox": adapter}, modifiers={"schedule": schedule}):
        seen, hook = watch(pipe, name)
        draw(pipe, steps=4)
        hook.remove()
    torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=1e-6)  # one rounding to fp32
    assert torch.equal(seen[0], before) and torch.equal(parameter(pipe, name), before)
