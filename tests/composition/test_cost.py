"""MACs of runs: the denoiser's counted on the meta device, evaluations counted on the plan and in a run."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from studio.composition.cost import Cost, UnetMacs, plan_cost, unet_macs
from studio.composition.engine import compose
from studio.composition.executor import Passes
from studio.composition.methods.cmlora import CmLora, CmLoraPlan
from studio.composition.plan import Cut, Step
from studio.errors import CompositionError

SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
ROLES = {"a": "high", "b": "high", "c": "low"}
TARGETS = (
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
)


def cmlora(names: str, **options: Any) -> CmLoraPlan:
    roles = {name: ROLES[name] for name in names}
    composer = CmLora(CmLora.Options(roles=roles, **options))
    return composer.prepare(dict.fromkeys(names), dict.fromkeys(names, 1.0))


@pytest.mark.parametrize(
    ("cut", "shallow", "share"),
    [(Cut(0, 1), 90_071_531_520, 0.224), (Cut(0, 2), 152_711_331_840, 0.380)],
    ids=["fast", "quality"],
)
def test_the_unet_of_sd_15_costs_what_is_known(cut: Cut, shallow: int, share: float) -> None:
    macs = unet_macs(SD15, 64, 64, cut)
    assert macs == UnetMacs(401_636_720_640, shallow)
    assert macs.shallow_share == pytest.approx(share, abs=5e-4)


def test_the_unet_of_sdxl_costs_what_is_known() -> None:
    macs = unet_macs(SDXL, 128, 128, Cut(1, 1))
    assert macs.full == 3_380_618_199_040
    assert macs.shallow_share == pytest.approx(0.214, abs=5e-4)


@pytest.mark.parametrize("build", ["short_sd", "short_sdxl"])
def test_a_unet_of_ones_own_costs_what_its_forward_pass_does(
    build: str, request: pytest.FixtureRequest
) -> None:
    unet = request.getfixturevalue(build)().unet
    given: dict[str, Any] = {
        "sample": torch.zeros(1, 4, 8, 12),
        "timestep": 1,
        "encoder_hidden_states": torch.zeros(1, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type:
        given["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.ones(1, 6)}
    # Of the CPU's own attention the counter knows nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(**given)
    assert unet_macs(unet, 8, 12).full == counter.get_total_flops() // 2
    assert unet_macs(unet.config, 8, 12) == unet_macs(unet, 8, 12) != unet_macs(unet, 12, 12)


def test_a_cut_that_a_unet_does_not_have_is_refused(short_sd: Any) -> None:
    with pytest.raises(CompositionError, match="cut layers must be from 1 to 1"):
        unet_macs(short_sd().unet, 8, 8, Cut(0, 2))


@pytest.mark.parametrize("cut", ["fast", "quality"])
@pytest.mark.parametrize("interval", [None, 2, 3, 5], ids="every {}".format)
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_cached_run_costs_what_the_formula_says(names: str, interval: int | None, cut: str) -> None:
    plan = cmlora(names, interval=interval, cut=cut)
    macs = unet_macs(SD15, 64, 64, plan.cut)
    total, count, f = 100, len(names), macs.shallow_share
    cost = plan_cost(plan, total, macs)
    # By hand: refreshes of one adapter, and two steps of all; 92 of 220 steps are the paper's refreshes.
    refreshes = 92 / 220 if interval is None else 1 / interval
    rho = refreshes + 2 * (count - 1) / total
    assert cost.ratio == pytest.approx(count * f + (1 - f) * rho, rel=0.05)
    whole = cost.passes.full / (2 * total)
    assert cost.ratio == pytest.approx(count * f + (1 - f) * whole, rel=1e-9)
    assert cost.cached_share == pytest.approx(1 - whole / count)
    assert cost.total == pytest.approx(cost.ratio * 2 * total * macs.full)


@pytest.mark.parametrize("total", [50, 100, 220])
def test_three_adapters_at_interval_3_cost_no_more_than_the_base(total: int) -> None:
    plan = cmlora("abc", interval=3, cut="fast")
    assert plan_cost(plan, total, unet_macs(SD15, 64, 64, plan.cut)).ratio <= 1.0


def test_a_base_that_is_not_cached_costs_1() -> None:
    from studio.composition.methods.merge import Merge

    cost = plan_cost(Merge().prepare({}, {}), 20, UnetMacs(100, 10), guided=False, pictures=3)
    assert cost == Cost(Passes(full=60, asked=60), UnetMacs(100, 10))
    assert (cost.evaluations, cost.total, cost.ratio, cost.cached_share) == (60, 6000, 1.0, 0.0)


CACHE = {"cache": {"interval": 3, "full_first": 1, "full_last": 1}}
SKIP = {"skip-guidance": {"start": 0.4, "end": 0.8}}


@pytest.mark.parametrize(
    ("method", "options", "modifiers", "guidance", "solver"),
    [
        ("merge", {}, {}, 5.0, "ddim"),
        ("merge", {}, {**CACHE, **SKIP}, 5.0, "ddim"),
        ("switch", {"switch_every": 1}, CACHE, 1.0, "ddim"),
        ("klora", {}, {"cache": {"interval": 2}}, 5.0, "ddim"),
        ("composite", {"shared_unconditional": True}, {**SKIP, **CACHE}, 5.0, "ddim"),
        ("sine", {"source": "a hill"}, CACHE, 5.0, "ddim"),
        ("cmlora", {"roles": ROLES}, {}, 5.0, "ddim"),
        ("cmlora", {"roles": ROLES, "max_age": 3}, {**SKIP, "pin": {"adapters": ["d"]}}, 5.0, "ddim"),
        ("cmlora", {"roles": ROLES, "interval": 2}, {}, 1.0, "heun"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_counted_on_a_plan_is_what_a_run_does(
    method: str,
    options: dict[str, Any],
    modifiers: dict[str, Any],
    guidance: float,
    solver: str,
    short_sd: Any,
    make_adapter: Any,
    draw: Any,
) -> None:
    from studio.models.schedulers import make_scheduler

    pipe = short_sd()
    pipe.scheduler = make_scheduler(pipe, solver)
    names = "abcd" if "pin" in modifiers else "abc"
    adapters = {name: make_adapter(pipe, seed, targets=TARGETS) for seed, name in enumerate(names)}
    total = 6
    with compose(pipe, adapters, method=method, options=options, modifiers=modifiers) as composition:
        draw(pipe, steps=total, guidance_scale=guidance, num_images_per_prompt=2)
        plan = composition.plan
    calls = [Step(index, total, index / total) for index in range(total)]
    if solver == "heun":
        # Two calls a step, but one for the last.
        calls = [step for step in calls for _ in range(2)][:-1]
    macs = unet_macs(pipe.unet, 8, 8, plan.cut)
    cost = plan_cost(plan, calls, macs, guided=guidance > 1, pictures=2)
    assert cost.passes == composition.passes
    assert cost == Cost(composition.passes, macs)


def test_the_operations_of_a_run_are_those_of_its_cost(short_sd: Any, make_adapter: Any, draw: Any) -> None:
    pipe = short_sd()
    adapters = {name: make_adapter(pipe, seed, targets=TARGETS) for seed, name in enumerate("abc")}
    counted = []
    options = {"roles": ROLES, "interval": 3}
    for method, chosen, given in (("merge", {}, {}), ("cmlora", options, adapters)):
        with (
            compose(pipe, given, method=method, options=chosen, batched=False) as composition,
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            draw(pipe, steps=6)
        counted.append(sum(counter.get_flop_counts()["UNet2DConditionModel"].values()))
    cost = Cost(composition.passes, unet_macs(pipe.unet, 8, 8, composition.plan.cut))
    assert 0 < cost.cached_share < 1
    assert counted[1] / counted[0] == pytest.approx(cost.ratio, rel=0.05)
