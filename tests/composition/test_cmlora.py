"""CMLoRA: who leads, what its answer counts for, what is computed whole, and that a run does just that."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from studio.composition import profiles
from studio.composition.engine import compose
from studio.composition.methods.cmlora import CmLora, CmLoraPlan
from studio.composition.plan import BaseInfo, Branch, Cut, Step
from studio.errors import CompositionError

ROLES = {"a": "high", "b": "low", "c": "high", "d": "low", "e": "high"}
TARGETS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
    "unet.mid_block.resnets.0.conv1.weight",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
)


def plan(count: int, **options: Any) -> CmLoraPlan:
    names = list(ROLES)[:count]
    roles = {name: ROLES[name] for name in names}
    composer = CmLora(CmLora.Options(**{"roles": roles, **options}))
    return composer.prepare(dict.fromkeys(names), {name: 0.8 for name in names})


def steps(total: int) -> list[Step]:
    return [Step(index, total, index / total) for index in range(total)]


def scored(monkeypatch: pytest.MonkeyPatch, **scores: float) -> Callable[..., CmLoraPlan]:
    """Return what makes plans for adapters whose measured scores are these."""
    found = {name: profiles.Profile((score,)) for name, score in scores.items()}
    monkeypatch.setattr(profiles, "profile", lambda pipe, adapters: {name: found[name] for name in adapters})

    def make(**options: Any) -> CmLoraPlan:
        base = BaseInfo("sd1", {}, pipe=object())
        composer = CmLora(CmLora.Options(**options))
        return composer.prepare(dict.fromkeys(scores), dict.fromkeys(scores, 1.0), base)

    return make


def spec(
    total: int, high: Sequence[str], low: Sequence[str], interval: int | None
) -> list[tuple[str, float, set[str]]]:
    """Return for each step who leads, what its answer counts for, and whose answers are whole.

    The algorithm as a loop over the steps, arXiv:2502.04923, with whole first and last steps.
    """
    names = sorted([*high, *low])
    found, turn, next_refresh = [], -1, 0
    for index in range(total):
        refresh = index == next_refresh
        if refresh:
            pause = interval or (2 if index < 0.375 * total or index >= 0.875 * total else 3)
            next_refresh += pause
        # Of a run of one or two steps all are whole.
        last = index == total - 1
        refresh = refresh and not (index == total - 2 and index > 0)
        turn += refresh
        now = (high or low) if index / total < 0.55 else (low or high)
        leader = now[turn % len(now)]
        factor = 1 + (max(len(names) - 0.5, 1) - 1) * 0.5**turn
        whole = set(names) if index == 0 or last else {leader} if refresh else set()
        found.append((leader, factor / (factor + len(names) - 1), whole))
    return found


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 50, 220], ids="T{}".format)
@pytest.mark.parametrize("interval", [None, 2, 3, 9], ids="every {}".format)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_plan_follows_the_algorithm(total: int, interval: int | None, count: int) -> None:
    given = plan(count, interval=interval)
    high, low = ([name for name in given.weights if ROLES[name] == role] for role in ("high", "low"))
    assert given.adapters == (*high, *low)
    for step, (leader, share, whole) in zip(steps(total), spec(total, high, low, interval), strict=True):
        branches = {next(iter(branch.weights)): branch for branch in given.at(step)}
        assert list(branches) == list(given.weights)
        assert branches[leader].share == pytest.approx(share)
        assert {name for name, branch in branches.items() if branch.reuse == 0} == whole
        for name, branch in branches.items():
            assert (branch.weights, branch.rows, branch.slot) == ({name: 0.8}, "all", name)
            assert branch.reuse in (0, step.index)
            if name != leader:
                assert branch.share == pytest.approx((1 - share) / (count - 1))


def test_the_papers_schedule_of_220_steps_has_92_refreshes() -> None:
    refreshes = plan(3, full_last=0).refreshes(220)
    assert len(refreshes) == 92
    pauses = {start: end - start for start, end in pairwise(refreshes)}
    assert {pauses[index] for index in pauses if 84 <= index < 192} == {3}
    assert {pauses[index] for index in pauses if not 82 <= index <= 192} == {2}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_leaders_advantage_decays_and_the_mean_weight_stays_1(count: int) -> None:
    given = plan(count, interval=2)
    best = []
    for step in steps(41)[:-1:2]:
        shares = [branch.share for branch in given.at(step)]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
        best.append(max(shares) / min(shares))
    assert best == pytest.approx([1 + (count - 1.5) * 0.5**turn for turn in range(len(best))])


@pytest.mark.parametrize(("decay", "wanted"), [(1.0, 4.0), (0.25, 1.75), (0.0, 1.0)])
def test_dominance_and_decay_can_be_set(decay: float, wanted: float) -> None:
    given = plan(2, interval=2, dominance=4.0, decay=decay)
    shares = [branch.share for branch in given.at(steps(20)[2])]
    assert max(shares) / min(shares) == pytest.approx(wanted)


def test_the_boundary_is_a_place_in_the_full_schedule() -> None:
    given = plan(2, boundary=0.7, dominance=3.0, decay=1.0)
    leaders = [max(given.at(step), key=lambda branch: branch.share).slot for step in steps(20)]
    assert leaders == ["a"] * 14 + ["b"] * 6
    assert max(given.at(Step(0, 5, 0.75)), key=lambda branch: branch.share).slot == "b"


def test_whole_steps_can_be_set() -> None:
    given = plan(3, interval=4, full_first=3, full_last=0)
    whole = [sum(branch.reuse == 0 for branch in given.at(step)) for step in steps(13)]
    assert whole == [3, 3, 3, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    given = plan(3, interval=4, full_last=5)
    whole = [sum(branch.reuse == 0 for branch in given.at(step)) for step in steps(13)]
    # Step 8 starts the last five; step 4 is far enough from it, 7 would not be.
    assert whole == [3, 0, 0, 0, 1, 0, 0, 0, 3, 3, 3, 3, 3]


def test_features_may_be_given_an_age_that_they_must_not_exceed() -> None:
    assert {branch.reuse for branch in plan(3, max_age=6).at(steps(50)[21])} == {6}
    assert {branch.reuse for branch in plan(3, max_age=6).at(steps(50)[3])} == {3}


@pytest.mark.parametrize(
    ("cut", "wanted"), [("fast", Cut(0, 1)), ("quality", Cut(0, 2)), ("deep", Cut(1, 1))], ids=str
)
def test_cuts_have_names(cut: str, wanted: Cut) -> None:
    assert plan(2, cut=cut).cut == wanted


@pytest.mark.parametrize(
    ("policy", "spoken", "texts"),
    [
        ("base", {}, set()),
        ("first", {"a": 0.8}, set()),
        ("merged", {"a": 0.8, "b": 0.8, "c": 0.8}, set()),
        ("own", {}, {"a", "b", "c"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_prompt_is_encoded_by_the_policy(policy: str, spoken: dict[str, float], texts: set[str]) -> None:
    given = plan(3, text_encoder_policy=policy)
    assert (given.text_weights, set(given.texts)) == (spoken, texts)
    assert {branch.text for branch in given.at(steps(9)[4])} == (texts or {None})


def test_scores_decide_who_leads_when(monkeypatch: pytest.MonkeyPatch) -> None:
    make = scored(monkeypatch, a=-0.2, b=0.1, c=0.4, d=0.0)
    given = make()
    assert (given.early, given.late) == (("c", "b"), ("d", "a"))
    assert given.adapters == ("c", "b", "d", "a") and list(given.weights) == ["a", "b", "c", "d"]
    assert make(roles={"c": "low", "a": "high"}).early == ("b", "a")


@pytest.mark.parametrize(
    ("scores", "split", "early", "late"),
    [
        ({"a": 0.1, "b": 0.2}, "sign", "ba", "ba"),
        ({"a": -0.1, "b": -0.2}, "sign", "ab", "ab"),
        ({"a": 0.1, "b": 0.5, "c": 0.45}, "means", "bc", "a"),
        ({"a": -0.1, "b": -0.5, "c": -0.45}, "means", "a", "cb"),
    ],
    ids=["all high", "all low", "means high", "means low"],
)
def test_adapters_are_split_by_sign_or_in_two_groups(
    scores: dict[str, float], split: str, early: str, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scored(monkeypatch, **scores)(split=split)
    assert ("".join(given.early), "".join(given.late)) == (early, late)


@pytest.mark.parametrize("base", [None, BaseInfo("sd1", {})], ids=["no base", "drawn only"])
def test_without_a_base_the_way_out_is_said(base: BaseInfo | None) -> None:
    composer = CmLora(CmLora.Options(roles={"a": "high"}))
    with pytest.raises(CompositionError, match=r"frequencies 'a', 'b', 'c' .* roles=\{\"b\": \"high\""):
        composer.prepare(dict.fromkeys("abc"), dict.fromkeys("abc", 1.0), base)
    # One adapter leads always.
    assert composer.prepare({"a": None}, {"a": 1.0}, base).late == ("a",)


@pytest.mark.parametrize(
    ("names", "roles", "says"),
    [("", {}, "got no adapters"), ("ab", {"ab": "low"}, "roles: unknown adapter 'ab'.*Known: a, b")],
)
def test_what_makes_no_plan_is_said(names: str, roles: dict[str, Any], says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        CmLora(CmLora.Options(roles=roles)).prepare(dict.fromkeys(names), dict.fromkeys(names, 1.0))


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def three(sd: Any, make_adapter: Any) -> dict[str, Any]:
    return {name: make_adapter(sd, seed, targets=TARGETS, text=True) for seed, name in enumerate("abc")}


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
@pytest.mark.parametrize("policy", ["first", "merged", "own"])
def test_with_interval_1_and_equal_weights_it_is_composite_bit_for_bit(
    batched: bool, policy: str, sd: Any, three: Any, draw: Any
) -> None:
    drawn = []
    own = {"interval": 1, "dominance": 1.0, "roles": {"a": "low", "b": "high", "c": "high"}}
    for method, options in (("composite", {}), ("cmlora", own)):
        options = {**options, "text_encoder_policy": policy}
        with compose(sd, three, method=method, options=options, batched=batched) as composition:
            drawn.append(draw(sd, steps=3))
        assert composition.passes.shallow == 0
    assert torch.equal(*drawn)


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
def test_a_run_is_the_loop_of_the_algorithm(batched: bool, sd: Any, three: Any, draw: Any) -> None:
    total = 8
    roles = {"a": "low", "b": "high", "c": "high"}
    wanted = by_hand(sd, three, spec(total, ["b", "c"], ["a"], 2))
    with compose(
        sd, three, method="cmlora", options={"interval": 2, "roles": roles}, batched=batched
    ) as composition:
        got = draw(sd, steps=total)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # eight steps in another order
    # Step 0 and the last are whole, refreshes are at 2 and 4: guidance doubles the rows.
    assert (composition.passes.full, composition.passes.shallow) == (2 * 8, 2 * 16)
    with compose(sd, three, method="composite"):
        assert not torch.allclose(draw(sd, steps=total), got, atol=1e-3)


@torch.no_grad()
def by_hand(pipe: Any, adapters: dict[str, Any], planned: list[tuple[str, float, set[str]]]) -> torch.Tensor:
    """Return a run in which the loop is written out, and kept features are put in the deep block's place."""
    generator = torch.Generator().manual_seed(0)
    with compose(pipe, adapters):
        prompt, negative = pipe.encode_prompt("a fox", "cpu", 1, True)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(len(planned))
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    kept: dict[str, torch.Tensor] = {}
    others = len(adapters) - 1
    for timestep, (leader, share, whole) in zip(scheduler.timesteps, planned, strict=True):
        answer = torch.zeros_like(latents)
        for name, adapter in adapters.items():

            def deep(_: Any, __: Any, output: Any, name: str = name, anew: bool = name in whole) -> Any:
                if anew:
                    kept[name] = output.clone()
                return kept[name]

            hook = pipe.unet.up_blocks[0].register_forward_hook(deep)
            with compose(pipe, {name: adapter}):
                pair = pipe.unet(torch.cat([latents] * 2), timestep, torch.cat([negative, prompt])).sample
            hook.remove()
            base, conditional = pair.chunk(2)
            guided = base + 7.5 * (conditional - base)
            answer += guided * (share if name == leader else (1 - share) / others)
        latents = scheduler.step(answer, timestep, latents).prev_sample
    return latents


def test_adapters_without_roles_are_measured_when_they_are_composed(
    one_block_sd: Any, make_frequency_adapter: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = one_block_sd()
    given = {name: make_frequency_adapter(pipe, name) for name in ("shapes", "edges")}
    drawn = []
    for _ in range(2):
        with compose(pipe, given, method="cmlora") as composition:
            assert (composition.plan.early, composition.plan.late) == (("edges",), ("shapes",))
            drawn.append(draw(pipe, steps=3))
        monkeypatch.setattr(profiles._Meter, "_measured", None)
    assert torch.equal(*drawn)


def test_guidance_can_be_skipped_in_a_cached_run(sd: Any, three: Any, draw: Any) -> None:
    roles = dict.fromkeys("abc", "high")
    options = {"interval": 9, "roles": roles, "full_last": 0}
    modifiers = {"skip-guidance": {"start": 0.5}}
    with compose(sd, three, method="cmlora", options=options, modifiers=modifiers) as composition:
        draw(sd, steps=4)
    # Features of two rows are none for one: the first step without guidance is whole again.
    assert (composition.passes.full, composition.passes.shallow) == (3 * (2 + 1), 3 * (2 + 1))


def test_every_branch_is_of_the_conditional_rows_too() -> None:
    table = plan(3, dominance=2.0, decay=1.0).describe(4)
    assert [row.adapter for row in table] == ["a", "c", "b"]
    assert sum(row.weights[0] for row in table) == pytest.approx(0.8)
    assert isinstance(plan(3).at(steps(4)[0])[0], Branch)
