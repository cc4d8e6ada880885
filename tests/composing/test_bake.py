"""One ordinary adapter has a composition's mean weights, and says how far it is from the composition."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import studio
from studio.adapters.files import load_adapter
from studio.composing.bake import BakeResult
from studio.errors import AdapterError, CompositionError, OutputError
from studio.specs import parse_spec
from studio.specs.composing import BakeSpec

from .conftest import ENCODER, LINEAR, WEIGHTS

Deltas = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def baked(composition: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., BakeResult]:
    """Return a function: changes of the request -> what baking makes, in fp32."""

    def run(**values: Any) -> BakeResult:
        given = {
            "base": "no/such/base",
            "output": tmp_path / "one.safetensors",
            "precision": "fp32",
            **values,
        }
        return studio.bake(parse_spec(BakeSpec, composition(**given)))

    return run


def delta(result: BakeResult, parameter: str) -> torch.Tensor:
    """Return the file's change of a parameter, fp64."""
    change = load_adapter(result.paths[0]).changes[parameter]
    return change.delta(torch.empty(change.shape), weight=1.0).double()


def check(result: BakeResult, deltas: Deltas, means: dict[str, Any]) -> None:
    """Compare a file with the sum of the adapters' changes at mean weights, a function of the parameter."""
    names = {name for each in deltas.values() for name in each}
    assert set(load_adapter(result.paths[0]).changes) == names
    for name in names:
        parts = [means[adapter](name) * each[name] for adapter, each in deltas.items() if name in each]
        torch.testing.assert_close(
            delta(result, name), torch.stack(parts).sum(0), rtol=0, atol=2e-6
        )  # fp32 factors


def always(weight: float) -> Callable[[str], float]:
    return lambda name: weight


def test_a_static_merge_is_kept_exactly(baked: Callable[..., BakeResult], deltas: Deltas) -> None:
    result = baked()
    check(result, deltas, {name: always(weight) for name, weight in WEIGHTS.items()})
    assert result.weights < 1e-6 and result.lost == () and result.pictures is None
    assert result.lines()[0].startswith("weights: relative distance 0.0000 from the composition's")


def test_a_switch_becomes_the_mean_of_its_steps(baked: Callable[..., BakeResult], deltas: Deltas) -> None:
    result = baked(method="switch", options={"switch_every": 2}, steps=5)
    # Of five steps the fox has three; the text encoders have both all the time.
    share = {"fox": 3 / 5, "ink": 2 / 5}
    means = {
        name: lambda parameter, name=name: WEIGHTS[name] * (1 if parameter == ENCODER else share[name])
        for name in WEIGHTS
    }
    check(result, deltas, means)

    missed = whole = 0.0
    for parameter in {parameter for each in deltas.values() for parameter in each}:
        zero = torch.zeros_like(deltas["fox"][parameter])
        fox, ink = (WEIGHTS[name] * deltas[name].get(parameter, zero) for name in WEIGHTS)
        steps = [fox + ink] * 5 if parameter == ENCODER else [fox, fox, ink, ink, fox]
        mean = torch.stack(steps).mean(0)
        missed += sum(float((step - mean).square().sum()) for step in steps)
        whole += sum(float(step.square().sum()) for step in steps)
    assert result.weights == pytest.approx(math.sqrt(missed / whole), abs=1e-6)
    assert result.weights > 0.3


def test_klora_is_averaged_layer_by_layer(
    baked: Callable[..., BakeResult], deltas: Deltas, composition: Callable[..., dict[str, Any]]
) -> None:
    result = baked(method="klora", steps=10)
    from studio.composing.planning import plan_of
    from studio.specs import CompositionSpec

    plan: Any = plan_of(parse_spec(CompositionSpec, composition(method="klora"))).plan
    points = plan.switching_points

    def share(name: str, parameter: str) -> float:
        turns = points[parameter.rpartition(".")[0]]
        acting = [[each for start, each in turns if not start or start < step / 10][-1] for step in range(10)]
        return acting.count(name) / 10

    means = {
        name: lambda parameter, name=name: (
            WEIGHTS[name] * (1 if parameter == ENCODER else share(name, parameter))
        )
        for name in WEIGHTS
    }
    check(result, deltas, means)
    assert len({share("fox", layer) for layer in deltas["ink"] if layer != ENCODER}) > 1


def test_shares_of_answers_become_weights_and_it_is_said(
    baked: Callable[..., BakeResult], deltas: Deltas
) -> None:
    options = {"shares": {"fox": 3.0}, "shared_unconditional": True, "text_encoder_policy": "own"}
    result = baked(method="composite", options=options, steps=3)
    check(result, deltas, {"fox": always(0.75 * 0.8), "ink": always(0.25 * 0.5)})
    assert result.lost == (
        "the rows of the negative prompt have other weights; those of the prompt count",
        "answers that are mixed become weights that are mixed, which is not the same",
    )
    assert [line for line in result.lines() if line.startswith("left out: ")] == [
        f"left out: {what}" for what in result.lost
    ]


@pytest.mark.parametrize(
    ("modifiers", "said"),
    [
        ({"skip-guidance": {"start": 0.5}}, "guidance, which the composition skips in some steps"),
        ({"cache": {"interval": 2}}, "features that a cache keeps are computed in every step"),
    ],
    ids=["skip-guidance", "cache"],
)
def test_what_saves_time_is_not_in_the_file_and_that_is_said(
    baked: Callable[..., BakeResult], modifiers: dict[str, Any], said: str
) -> None:
    (lost,) = baked(modifiers=modifiers, steps=8).lost
    assert said in lost


def test_weights_over_steps_count_with_their_mean(baked: Callable[..., BakeResult], deltas: Deltas) -> None:
    modifiers = {"schedule": {"weights": {"ink": [[0, 0], [1, 1]]}}}
    result = baked(modifiers=modifiers, steps=4)
    # At 0, 1/4, 2/4 and 3/4 of the run; the text encoders keep the adapter's own weight.
    means = {
        "fox": always(0.8),
        "ink": lambda parameter: 0.5 * (1 if parameter == ENCODER else (0 + 0.25 + 0.5 + 0.75) / 4),
    }
    check(result, deltas, means)


def test_a_rank_loses_the_smallest_part_and_the_distance_counts_it(
    baked: Callable[..., BakeResult], deltas: Deltas
) -> None:
    result = baked(max_rank=1)
    wanted = sum(WEIGHTS[name] * deltas[name][LINEAR] for name in WEIGHTS)
    assert isinstance(wanted, torch.Tensor)
    left, sizes, right = torch.linalg.svd(wanted)
    best = sizes[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(delta(result, LINEAR), best, rtol=0, atol=1e-5)  # fp32 factors
    missed = whole = 0.0
    for parameter in {parameter for each in deltas.values() for parameter in each}:
        parts = [WEIGHTS[name] * each[parameter] for name, each in deltas.items() if parameter in each]
        values = torch.linalg.svdvals(torch.stack(parts).sum(0)).square()
        missed, whole = missed + float(values[1:].sum()), whole + float(values.sum())
    assert result.weights == pytest.approx(math.sqrt(missed / whole), abs=1e-5)


def test_pictures_say_how_near_the_one_adapter_draws(
    baked: Callable[..., BakeResult], base: str, tmp_path: Path
) -> None:
    drawing: dict[str, Any] = {
        "base": base,
        "prompts": ["a fox"],
        "seeds": "1-2",
        "steps": 2,
        "device": "cpu",
    }
    same = baked(**drawing).pictures
    assert same is not None and same.baked < 1e-3 < same.base
    options = {"switch_every": 1}
    apart = baked(**drawing, method="switch", options=options, overwrite=True).pictures
    assert apart is not None and apart.baked > 1e-3
    assert len(load_adapter(tmp_path / "one.safetensors").changes) > 2


def test_the_file_is_an_ordinary_one_that_tells_its_recipe(
    baked: Callable[..., BakeResult], duo: Path
) -> None:
    result = baked(method="switch", steps=10)
    recipe = json.loads(load_adapter(result.paths[0]).metadata["studio.bake"])
    assert (recipe["method"], recipe["steps"], recipe["options"]["switch_every"]) == ("switch", 10, 5)
    assert [(use["name"], use["weight"]) for use in recipe["adapters"]] == [("fox", 0.8), ("ink", 0.5)]
    assert result.adapter.kind == "lora"
    with pytest.raises(OutputError, match=r"one\.safetensors exists"):
        baked()


def test_what_no_adapter_can_hold_is_refused(
    baked: Callable[..., BakeResult],
    composition: Callable[..., dict[str, Any]],
    short_sd: Callable[[], Any],
    tmp_path: Path,
) -> None:
    for name, box in (("fox", (0, 0, 32, 64)), ("ink", (32, 0, 64, 64))):
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    regions = {name: str(tmp_path / f"{name}.png") for name in ("fox", "ink")}
    with pytest.raises(CompositionError, match="gives regions of the picture to adapters, which no adapter"):
        baked(method="regions", options={"regions": regions})
    with pytest.raises(CompositionError, match="'ink' acts on the rows of the negative prompt alone"):
        baked(modifiers={"negative": {"adapters": ["ink"]}})
    with pytest.raises(CompositionError, match="switch_every=5 in a run of 4 steps"):
        baked(method="switch", steps=4)
    assert not (tmp_path / "one.safetensors").exists()

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds import dora

    change = dora.DoraChange.sample((32, 32), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "dora.safetensors"
    studio.save_adapter(Adapter("dora", "dora", {LINEAR: change}), path, base=short_sd())
    uses = [{"path": str(path)}]
    with pytest.raises(AdapterError, match=r"'dora' is of the kind dora.*Give --measure, which loads it\."):
        baked(adapters=uses)
    with pytest.raises(AdapterError, match=r"the base is not loaded\..*Here --measure loads the base"):
        baked(adapters=uses, options={"how": "svd"})
    base = composition()["base"]
    measured = baked(adapters=uses, base=base, measure=True, device="cpu")
    pipe = studio.load_base(base, device="cpu")
    weight = dict(pipe.unet.named_parameters())[LINEAR.removeprefix("unet.")].detach()
    wanted = load_adapter(path, base=pipe).changes[LINEAR].delta(weight, weight=1.0)
    torch.testing.assert_close(
        delta(measured, LINEAR), wanted.double(), rtol=0, atol=1e-5
    )  # of full rank in fp32 factors
