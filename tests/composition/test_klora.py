"""K-LoRA's plan against the published formula, evaluated on dense changes in fp64."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.names import reference_names
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.composition import layer_sums
from studio.composition.engine import compose
from studio.composition.methods.klora import KLora, KLoraPlan
from studio.composition.plan import BaseInfo, Step
from studio.errors import BaseNeeded, CompositionError
from studio.models.fingerprint import fingerprint
from studio.registry import KINDS

SHAPES: Mapping[str, tuple[int, ...]] = {
    "unet.down_blocks.0.attentions.0.to_q": (12, 20),
    "unet.down_blocks.0.attentions.0.to_k": (16, 9),
    "unet.down_blocks.0.resnets.0.conv1": (6, 5, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (8, 8, 1, 1),
    **{f"unet.up_blocks.{level}.attentions.0.to_v": (10 + level, 14) for level in range(8)},
}
STEPS = (8, 20, 50)


def steps(total: int) -> list[Step]:
    return [Step(index, total, index / total) for index in range(total)]


def adapter(seed: int, layers: Sequence[str] = tuple(SHAPES), *, name: str = "") -> Adapter:
    """Return an adapter with a rank, alpha and size of its own in each layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    changes = {}
    for layer in layers:
        out, *inner = SHAPES[layer]
        rank = int(torch.randint(1, 6, (), generator=generator))
        size = float(torch.rand((), generator=generator)) + 0.3
        up = draw(out, rank, *(1 for _ in inner[1:]))
        changes[f"{layer}.weight"] = LoraChange(draw(rank, *inner) * size, up, alpha=1.0 + seed % 3)
    return Adapter(name or f"adapter{seed}", "lora", changes)


def dense(one: Adapter, layer: str, weight: float = 1.0) -> Tensor:
    """Return the effective change of a layer ``[out, in]``, fp64."""
    change = one.changes[f"{layer}.weight"]
    scale = weight * change.alpha / change.down.shape[0]
    return scale * (change.up.double().flatten(1) @ change.down.double().flatten(1))


def top(delta: Tensor, k: int) -> float:
    return float(delta.abs().flatten().sort(descending=True).values[:k].sum())


def balance(mode: str, content: list[float], style: list[float]) -> float:
    """Return gamma from the layers' sums of absolute entries."""
    if mode == "one":
        return 1.0
    if mode == "global":
        return sum(content) / sum(style)
    ratios = [one / other for one, other in zip(content, style, strict=True)]
    mean = sum(ratios) / len(ratios)
    ratios = [ratio for ratio in ratios if ratio < 3 * mean]
    return sum(ratios) / len(ratios)


def published(
    content: Adapter, style: Adapter, total: int, *, schedule: str, gamma: str, weights: tuple[float, float]
) -> list[list[str]]:
    """Return what acts, by step and layer, as arXiv:2502.18461 has it."""
    deltas = [
        [dense(one, layer, weight) for layer in SHAPES]
        for one, weight in zip((content, style), weights, strict=True)
    ]
    balanced = balance(gamma, *([float(delta.abs().sum()) for delta in group] for group in deltas))
    table = []
    for t in range(total):
        scale = 1.5 * t / total + 0.5 if schedule == "s" else (1.5 * t / total + 1.3) % 1.5
        row = []
        for layer, one, other in zip(SHAPES, *deltas, strict=True):
            ranks = [each.changes[f"{layer}.weight"].down.shape[0] for each in (content, style)]
            k = ranks[0] * ranks[1]
            row.append("content" if top(one, k) >= balanced * scale * top(other, k) else "style")
        table.append(row)
    return table


def plan_of(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float] | None = None, **options: Any
) -> KLoraPlan:
    given = weights or dict.fromkeys(adapters, 1.0)
    base = options.pop("base", None)
    return KLora(KLora.Options(**options)).prepare(adapters, given, base)


def acting(plan: KLoraPlan, step: Step, layers: Sequence[str] = tuple(SHAPES)) -> list[str]:
    """Return the one adapter with a weight in each layer."""
    (branch,) = plan.at(step)
    found = []
    for layer in layers:
        names = [name for name in plan.adapters if branch.weight(name, f"{layer}.weight")]
        assert len(names) == 1, (layer, names)
        found += names
    return found


@pytest.mark.parametrize("total", STEPS, ids="T{}".format)
@pytest.mark.parametrize("gamma", ["global", "layers", "one"])
@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_the_selection_is_that_of_the_published_formula(schedule: str, gamma: str, total: int) -> None:
    both: set[str] = set()
    for seed in (1, 2, 3):
        content, style = adapter(seed), adapter(seed + 10)
        weights = (0.8, -1.1)
        plan = plan_of(
            {"content": content, "style": style},
            dict(zip(("content", "style"), weights, strict=True)),
            schedule=schedule,
            gamma=gamma,
        )
        wanted = published(content, style, total, schedule=schedule, gamma=gamma, weights=weights)
        assert [acting(plan, step) for step in steps(total)] == wanted
        both |= {name for row in wanted for name in row}
    assert both == {"content", "style"}


def test_each_adapter_acts_with_its_own_weight() -> None:
    plan = plan_of({"content": adapter(1), "style": adapter(2)}, {"content": 0.8, "style": -1.1})
    (branch,) = plan.at(Step(10, 20, 0.5))
    found = {branch.weight(name, f"{layer}.weight") for layer in SHAPES for name in plan.adapters}
    assert found == {0.8, -1.1, 0.0}


def test_the_outlier_mode_drops_what_is_three_times_the_mean() -> None:
    content = adapter(1)
    name = f"{next(iter(SHAPES))}.weight"
    changes = dict(content.changes)
    changes[name] = replace(changes[name], alpha=1000.0)
    content, style = replace(content, changes=changes), adapter(2)
    plan = plan_of({"content": content, "style": style}, gamma="layers")
    wanted = published(content, style, 20, schedule="s", gamma="layers", weights=(1.0, 1.0))
    assert [acting(plan, step) for step in steps(20)] == wanted
    assert wanted != published(content, style, 20, schedule="s", gamma="global", weights=(1.0, 1.0))


def test_the_order_of_the_layers_in_the_files_does_not_matter() -> None:
    content, style = adapter(1), adapter(2)
    shuffled = replace(style, changes=dict(sorted(style.changes.items(), reverse=True)))
    one, other = (plan_of({"content": content, "style": each}) for each in (style, shuffled))
    assert [acting(one, step) for step in steps(20)] == [acting(other, step) for step in steps(20)]


def test_a_layer_that_one_adapter_changes_is_always_that_adapters() -> None:
    layers = list(SHAPES)
    content, style = adapter(1, layers[:8]), adapter(2, layers[4:])
    plan = plan_of({"content": content, "style": style})
    for step in steps(20):
        row = acting(plan, step)
        assert row[:4] == ["content"] * 4 and row[8:] == ["style"] * 4
    # gamma balances the layers that both change, so the others make no difference to them.
    same = plan_of({"content": adapter(1, layers[4:8]), "style": style})
    shared = [layer.ratio for layer in plan.layers if layer.content != layer.style]
    assert len(shared) == 4
    content_alone = {"content": replace(content, changes=dict(list(content.changes.items())[4:]))}
    trimmed = plan_of({**content_alone, "style": style})
    assert [layer.ratio for layer in trimmed.layers if layer.content != layer.style] == shared
    assert len(same.layers) == 8


def test_adapters_without_a_common_layer_all_act_everywhere_and_nothing_is_measured(
    measured: list[str],
) -> None:
    layers = list(SHAPES)
    plan = plan_of({"content": adapter(1, layers[:6]), "style": adapter(2, layers[6:])})
    assert acting(plan, Step(0, 1, 0.0)) == ["content"] * 6 + ["style"] * 6
    assert measured == []


@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_of_three_adapters_the_largest_weighted_score_wins(schedule: str) -> None:
    layers = list(SHAPES)
    adapters = {
        "content": adapter(1, layers[:9]),
        "one": adapter(2),
        "two": adapter(3, [*layers[2:7], *layers[8:]]),
    }
    plan = plan_of(adapters, k=7, schedule=schedule)

    def has(name: str, layer: str) -> bool:
        return f"{layer}.weight" in adapters[name].changes

    def gamma(first: str, other: str) -> float:
        common = [layer for layer in layers if has(first, layer) and has(other, layer)]
        # Of the pairs that meet: the content with each style, and the first style where it stands in.
        if first != "content":
            common = [layer for layer in common if not has("content", layer)]
        sums = [
            sum(float(dense(adapters[name], layer).abs().sum()) for layer in common)
            for name in (first, other)
        ]
        return sums[0] / sums[1]

    winners: set[str] = set()
    for step in steps(20):
        scale = 1.5 * step.fraction + 0.5 if schedule == "s" else (1.5 * step.fraction + 1.3) % 1.5
        wanted = []
        for layer in layers:
            first, *others = [name for name in adapters if has(name, layer)]
            scores = {first: top(dense(adapters[first], layer), 7)}
            for name in others:
                factor = scale if first == "content" else 1.0
                scores[name] = factor * gamma(first, name) * top(dense(adapters[name], layer), 7)
            wanted.append(max(scores, key=lambda name: scores[name]))
        assert acting(plan, step) == wanted
        winners |= set(wanted)
    assert winners == set(adapters)


def test_ties_go_to_the_content_and_among_styles_to_the_first() -> None:
    same = adapter(1)
    plan = plan_of({"content": same, "one": same, "two": same}, gamma="one")
    # The scores are equal, so the content acts up to S(u) = 1, at u = 1/3, that place included.
    assert set(acting(plan, Step(0, 3, 0.0))) == {"content"}
    assert set(acting(plan, Step(1, 3, (1 - 0.5) / 1.5))) == {"content"}
    assert set(acting(plan, Step(1, 3, 0.334))) == {"one"}


def test_image_to_image_starts_inside_the_schedule() -> None:
    adapters = {"content": adapter(1), "style": adapter(2)}
    plan = plan_of(adapters)
    whole = [acting(plan, step) for step in steps(20)]
    part = [acting(plan, Step(index, 8, (12 + index) / 20)) for index in range(8)]
    assert part == whole[12:]
    assert part != [acting(plan, step) for step in steps(8)]


@pytest.mark.parametrize("schedule", ["s", "s*"])
def test_switching_points_say_the_same_as_the_steps(schedule: str) -> None:
    adapters = {"content": adapter(1), "style": adapter(2), "more": adapter(3, list(SHAPES)[3:9])}
    plan = plan_of(adapters, schedule=schedule)
    points = plan.switching_points
    assert set(points) == set(SHAPES)
    for step in steps(997):
        row = [[name for start, name in points[layer] if start <= step.fraction][-1] for layer in SHAPES]
        assert row == acting(plan, step)
    for turns in points.values():
        assert turns[0][0] == 0 and len(turns) <= (2 if schedule == "s" else 3)
        assert all(one[0] < two[0] and one[1] != two[1] for one, two in itertools.pairwise(turns))
    assert max(map(len, points.values())) == (2 if schedule == "s" else 3)


def test_content_names_the_adapter_that_comes_first() -> None:
    adapters = {"style": adapter(2), "content": adapter(1)}
    plan = plan_of(adapters, content="content", text_encoder_policy="first")
    assert plan.adapters == ("style", "content")
    assert plan.text_weights == {"content": 1.0}
    other = plan_of(dict(reversed(adapters.items())))
    assert [acting(plan, step) for step in steps(8)] == [acting(other, step) for step in steps(8)]
    assert plan_of(adapters).text_weights == {"style": 1.0, "content": 1.0}


def test_alpha_beta_and_k_change_the_selection() -> None:
    adapters = {"content": adapter(1), "style": adapter(2)}
    usual = [acting(plan_of(adapters), step) for step in steps(20)]
    for options in ({"alpha": 0.7}, {"beta": 1.1}, {"k": 1}):
        assert [acting(plan_of(adapters, **options), step) for step in steps(20)] != usual, options
    assert set(acting(plan_of(adapters, beta=100.0), Step(0, 1, 0.0))) == {"style"}


def test_weights_count_in_the_decision_when_gamma_is_one() -> None:
    adapters = {"content": adapter(1), "style": adapter(2)}
    light = {"content": 1.0, "style": 0.01}
    assert set(acting(plan_of(adapters, light, gamma="one"), Step(19, 20, 0.95))) == {"content"}
    usual = [acting(plan_of(adapters), step) for step in steps(20)]
    assert [acting(plan_of(adapters, light), step) for step in steps(20)] == usual


def test_an_adapter_of_weight_zero_or_without_effect_leaves_the_layers_to_the_other() -> None:
    content, style = adapter(1), adapter(2)
    plan = plan_of({"content": content, "style": style}, {"content": 0.0, "style": 1.0})
    assert set(acting(plan, Step(0, 1, 0.0))) == {"style"}
    idle = {name: replace(change, up=torch.zeros_like(change.up)) for name, change in content.changes.items()}
    untrained = replace(content, changes=idle)
    assert set(acting(plan_of({"content": untrained, "style": style}), Step(0, 1, 0.0))) == {"style"}
    late = Step(99, 100, 0.99)
    assert set(acting(plan_of({"content": style, "style": untrained}), late)) == {"content"}


def test_an_adapter_that_loses_everywhere_is_named() -> None:
    adapters = {"content": adapter(1), "style": adapter(2), "weak": adapter(3)}
    plan = plan_of(adapters, {"content": 1.0, "style": 1.0, "weak": 1e-3}, gamma="one")
    (said,) = plan.without_effect(steps(20))
    assert said.startswith("klora: 'weak' acts on no layer") and "leave it out" in said
    assert not list(plan_of(adapters).without_effect(steps(20)))


def test_the_table_tells_the_share_of_the_layers() -> None:
    plan = plan_of({"content": adapter(1), "style": adapter(2)}, {"content": 1.0, "style": 0.5})
    rows = {row.adapter: row.weights for row in plan.describe(8)}
    for index, step in enumerate(steps(8)):
        share = acting(plan, step).count("content") / len(SHAPES)
        assert math.isclose(rows["content"][index], share)
        assert math.isclose(rows["style"][index], 0.5 * (1 - share))


def test_steps_of_the_same_selection_share_a_branch_and_touch_no_tensor() -> None:
    plan = plan_of({"content": adapter(1), "style": adapter(2)})

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"the plan calls {func}")

    with Refuse():
        branches = [plan.at(step)[0] for step in steps(1000)]
    assert len({id(branch) for branch in branches}) == len({branch.weighting for branch in branches})
    assert 1 < len({id(branch) for branch in branches}) <= len(SHAPES) + 1


@pytest.mark.parametrize("count", [1, 2, 63, 341, 5000])
@pytest.mark.parametrize("block", [1, 37, 2**22])
@pytest.mark.parametrize("shape", [(1, 1), (63, 17), (9, 5, 3, 3)], ids=str)
def test_sums_in_blocks_equal_those_of_the_dense_change(
    shape: tuple[int, ...], block: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_sums, "_BLOCK", block)
    change = LoraChange.sample(shape, generator=torch.Generator().manual_seed(0))
    one = Adapter("x", "lora", {"unet.a.weight": change})
    sums = layer_sums.layer_sums(one, {"unet.a": {count, 1}}, weight=-0.5)["unet.a"]
    whole = change.delta(torch.empty(shape), weight=-0.5).double().abs().flatten()
    wanted = whole.topk(min(count, len(whole))).values.sum()
    assert sums.largest[count] == pytest.approx(float(wanted), rel=1e-5)  # fp32 sums
    assert sums.largest[1] == pytest.approx(float(whole.max()), rel=1e-5)
    assert sums.total == pytest.approx(float(whole.sum()), rel=1e-5)


def test_the_largest_are_found_among_many_and_among_equals() -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    found = layer_sums._largest(values, 100).sort().values
    assert torch.equal(found, values.topk(100).values.sort().values)
    assert layer_sums._largest(torch.ones(10_000), 7).tolist() == [1.0] * 7


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by one entry for each layer that is measured."""
    seen: list[str] = []
    original: Callable[..., dict[str, float]] = layer_sums._measured

    def counting(blocks: Any, counts: Sequence[int]) -> dict[str, float]:
        seen.append(str(counts))
        return original(blocks, counts)

    monkeypatch.setattr(layer_sums, "_measured", counting)
    return seen


def test_an_adapter_is_measured_once_whatever_its_name_and_weight(measured: list[str]) -> None:
    content, style = adapter(1), adapter(2)
    first = plan_of({"content": content, "style": style})
    assert len(measured) == 2 * len(SHAPES)
    measured.clear()
    again = plan_of(
        {"content": replace(content, name="another"), "style": style}, {"content": 0.3, "style": 2.0}
    )
    assert measured == []
    ratios = [layer.ratio for layer in first.layers]
    assert [layer.ratio for layer in again.layers] == pytest.approx(ratios)
    plan_of({"content": content, "style": style}, k=3)
    assert len(measured) == 2 * len(SHAPES)
    measured.clear()
    name = next(iter(content.changes))
    changed = {**content.changes, name: replace(content.changes[name], alpha=9.0)}
    plan_of({"content": replace(content, changes=changed), "style": style})
    assert len(measured) == len(SHAPES)


@pytest.mark.parametrize("damage", ["empty", "half", "digit"])
def test_what_was_measured_is_measured_anew_when_its_file_is_damaged(
    damage: str, measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path))
    adapters = {"content": adapter(1), "style": adapter(2)}
    wanted = [layer.ratio for layer in plan_of(adapters).layers]
    files = list((tmp_path / "facts" / "layer-sums").iterdir())
    assert len(files) == 2
    for path in files:
        text = path.read_text()
        broken = {"empty": "", "half": text[: len(text) // 2], "digit": text.replace("1", "2")}
        path.write_text(broken[damage])
    measured.clear()
    assert [layer.ratio for layer in plan_of(adapters).layers] == wanted
    assert len(measured) == 2 * len(SHAPES)
    measured.clear()
    assert [layer.ratio for layer in plan_of(adapters).layers] == wanted
    assert measured == []


def test_a_workspace_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = {"content": adapter(1), "style": adapter(2)}
    wanted = plan_of(adapters).layers
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "file"))
    assert plan_of(adapters).layers == wanted
    assert "cannot be kept" in caplog.text


def test_sdxl_has_560_attention_layers() -> None:
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    names = [
        name
        for name in reference_names("sdxl")
        if name.startswith("unet.") and name.removesuffix(".weight").endswith(ends)
    ]
    assert len(names) == 560

    def tiny(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randn(2 * len(names), 4, generator=generator)
        pairs = zip(factors[::2], factors[1::2], strict=True)
        changes = {
            name: LoraChange(down[None], up[:, None], 1.0)
            for name, (down, up) in zip(names, pairs, strict=True)
        }
        return Adapter("tiny", "lora", changes)

    plan = plan_of({"content": tiny(1), "style": tiny(2)})
    assert len(plan.layers) == len(plan.switching_points) == 560
    shares = plan.describe(50)[0].weights
    assert all(one >= two for one, two in itertools.pairwise(shares)) and shares[0] > shares[-1]


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft", "full", "sparse"])
def test_other_kinds_are_measured_on_the_base(kind: str, short_sd: Any, measured: list[str]) -> None:
    pipe = short_sd()
    base = BaseInfo("sd1", canonical_names(components_of(pipe)), pipe)
    names = [name for name in base.shapes if ".attn1." in name and name.endswith("weight")]
    generator = torch.Generator().manual_seed(0)
    adapters = {
        "content": Adapter(
            "c", kind, {name: KINDS[kind].sample(base.shapes[name], generator=generator) for name in names}
        ),
        "style": Adapter(
            "s", "lora", {name: LoraChange.sample(base.shapes[name], generator=generator) for name in names}
        ),
    }
    weights = {"content": 0.7, "style": 1.3}
    plan = plan_of(adapters, weights, base=base, k=11, gamma="one")

    def score(name: str, parameter: str) -> float:
        weight = find_parameter(components_of(pipe), parameter).detach()
        return top(adapters[name].changes[parameter].delta(weight, weight=weights[name]).double(), 11)

    wanted = [score("content", name) / score("style", name) for name in names]
    assert [layer.ratio for layer in plan.layers] == pytest.approx(wanted, rel=1e-5)  # fp32 sums
    measured.clear()
    not_loaded = BaseInfo(fingerprint=fingerprint(pipe))
    for known in (base, not_loaded):
        assert plan_of(adapters, weights, base=known, k=11, gamma="one") == plan
    assert measured == []
    for unknown in (None, BaseInfo(fingerprint="another")):
        with pytest.raises(BaseNeeded, match=r"'c' .* no base was given. Compose on a pipeline"):
            plan_of(adapters, weights, base=unknown, k=11)


def test_a_change_without_rank_asks_for_k() -> None:
    layer = next(iter(SHAPES))
    whole = Adapter("whole", "full", {f"{layer}.weight": FullChange(torch.ones(SHAPES[layer]))})
    with pytest.raises(CompositionError, match=r"'whole' .full. changes .* without a rank.* Set k"):
        plan_of({"content": adapter(1), "style": whole})


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(CompositionError, match=r"got no adapters. Give at least one"):
        plan_of({}, {})
    with pytest.raises(CompositionError, match=r"got 'only' alone. Give two adapters or more, or .* 'merge'"):
        plan_of({"only": adapter(1)})
    with pytest.raises(CompositionError, match=r"content: unknown adapter 'cat'. Did you mean 'cats'"):
        plan_of({"cats": adapter(1)}, content="cat")
    broken = adapter(1, name="broken")
    name = next(iter(broken.changes))
    nan = replace(broken.changes[name], up=broken.changes[name].up * math.nan)
    with pytest.raises(CompositionError, match="'broken' holds NaN or infinity in"):
        plan_of({"content": replace(broken, changes={**broken.changes, name: nan}), "style": adapter(2)})


@pytest.mark.parametrize("strength", [1.0, 0.5], ids=["text-to-image", "image-to-image"])
def test_the_engine_gives_each_layer_the_adapter_of_the_plan(
    strength: float, short_sd: Any, make_adapter: Any, draw: Any, summed: Any, parameter: Any
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = short_sd()
    targets = [
        name
        for name in canonical_names(components_of(pipe))
        if name.startswith("unet.") and name.endswith(("to_q.weight", "conv1.weight"))
    ]
    adapters = {name: make_adapter(pipe, seed, targets=targets) for seed, name in enumerate(("c", "s"))}
    wanted = {
        (name, each): summed(pipe, [(adapters[each], 1.0)], name).float() for name in targets for each in "cs"
    }
    seen: list[list[str]] = []

    def look(*_: Any) -> None:
        row = []
        for name in targets:
            value = parameter(pipe, name)
            row += [each for each in "cs" if torch.allclose(value, wanted[name, each], atol=1e-6)]
        seen.append(row)

    if strength < 1:
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
    more = {"image": torch.rand(1, 3, 64, 64), "strength": strength} if strength < 1 else {}
    with compose(pipe, adapters, method="klora") as composition:
        handle = pipe.unet.register_forward_hook(look)
        draw(pipe, steps=4, **more)
        handle.remove()
    first = 0 if strength == 1 else 2
    plan: Any = composition.plan
    layers = [name.removesuffix(".weight") for name in targets]
    assert seen == [acting(plan, Step(i, 4 - first, (first + i) / 4), layers) for i in range(4 - first)]
    assert len({name for row in seen for name in row}) == 2
