"""The composition method `merge` with a merging algorithm: it draws with one adapter formed of all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import studio
from studio.adapters.merge import merge_adapters
from studio.composition.methods.merge import Merge
from studio.composition.plan import BaseInfo, Branch, Step
from studio.errors import AdapterError, SpecError
from studio.registry import KINDS, MERGERS
from studio.specs import GenerateSpec, parse_spec

WEIGHTS = {"a": 0.8, "b": -0.6}


@pytest.fixture
def pipe(short_sd: Callable[[], Any]) -> Any:
    return short_sd()


@pytest.fixture
def two(pipe: Any, make_adapter: Callable[..., Any]) -> dict[str, Any]:
    return {"a": make_adapter(pipe, 1, text=True), "b": make_adapter(pipe, 2, text=True)}


@pytest.mark.parametrize("how", [name for name in MERGERS if name != "linear"])
def test_the_plan_forms_the_adapter_that_merging_makes(two: dict[str, Any], how: str) -> None:
    plan = Merge(Merge.Options(how=how)).prepare(two, WEIGHTS)
    (name,) = plan.adapters
    assert name == f"{how} of a, b" and plan.constant
    assert plan.at(Step(3, 9, 0.3)) == (Branch({name: 1.0}),) and plan.text_weights == {name: 1.0}
    wanted = merge_adapters(two, WEIGHTS, MERGERS[how]()).adapter.changes
    formed = plan.formed[name].changes
    assert formed.keys() == wanted.keys()
    assert all(torch.equal(formed[key].up, change.up) for key, change in wanted.items())


def test_linear_forms_nothing_and_keeps_the_adapters_apart(two: dict[str, Any]) -> None:
    plan = Merge(Merge.Options(how="linear")).prepare(two, WEIGHTS)
    assert plan.adapters == ("a", "b") and plan.formed == {} and plan.text_weights == WEIGHTS


def test_a_composition_has_the_weights_of_the_merged_adapter_and_gives_them_back(
    pipe: Any, two: dict[str, Any], parameter: Callable[..., Any], target: dict[str, str]
) -> None:
    before = {kind: parameter(pipe, name).clone() for kind, name in target.items()}
    options = {"how": "ties", "density": 0.4, "rank": 2}
    merged = merge_adapters(two, WEIGHTS, MERGERS["ties"](density=0.4, rank=2)).adapter
    with studio.compose(pipe, two, method="merge", weights=WEIGHTS, options=options) as composition:
        for kind, name in target.items():
            wanted = before[kind] + merged.changes[name].delta(before[kind], weight=1.0)
            torch.testing.assert_close(parameter(pipe, name), wanted)  # fp32, in one sum and in two.
        (row,) = composition.describe(3)
        assert row.adapter == "ties of a, b" and row.weights == (1.0, 1.0, 1.0)
        pipe("a fox", num_inference_steps=2, output_type="latent")
    assert all(torch.equal(parameter(pipe, name), before[kind]) for kind, name in target.items())


def test_kinds_that_depend_on_the_base_are_merged_where_it_is_known(
    pipe: Any, two: dict[str, Any], parameter: Callable[..., Any], target: dict[str, str]
) -> None:
    name, weight = target["linear"], parameter(pipe, target["linear"])
    dora = KINDS["dora"].sample(tuple(weight.shape), generator=torch.Generator().manual_seed(0))
    mixed = two | {"a": replace(two["a"], kind="dora", changes={name: dora})}
    merge = Merge(Merge.Options(how="soup"))
    with pytest.raises(AdapterError, match="depends on the base's weight, and the base is not loaded"):
        merge.prepare(mixed, {"a": 1.0, "b": 1.0})
    plan = merge.prepare(mixed, {"a": 1.0, "b": 1.0}, BaseInfo("sd1", {}, pipe))
    got = plan.formed["soup of a, b"].changes[name].delta(weight, weight=1.0)
    wanted = sum(adapter.changes[name].delta(weight, weight=0.5) for adapter in mixed.values())
    torch.testing.assert_close(got, wanted)  # fp32 in another order.


def test_a_request_gives_the_algorithm_and_its_options_flat() -> None:
    given = {"prompt": "x", "method": "merge", "how": "dare", "density": "0.3", "merge-seed": 4}
    options = parse_spec(GenerateSpec, given).options
    assert options == Merge.Options(how="dare", density=0.3, merge_seed=4)
    assert options.merger() == MERGERS["dare"](density=0.3, merge_seed=4)
    with pytest.raises(SpecError, match="density: counts only where how is one of dare, magnitude"):
        parse_spec(GenerateSpec, given | {"how": "lego"})
    with pytest.raises(SpecError, match="how: unknown merging algorithm 'dear'"):
        parse_spec(GenerateSpec, given | {"how": "dear"})
