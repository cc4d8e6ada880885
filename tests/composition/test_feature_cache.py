"""Deep features kept between steps: right when fresh, cheaper when reused, and nothing else changed."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from studio.composition.feature_cache import FeatureCache
from studio.composition.plan import Cut
from studio.errors import CompositionError


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def unet(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)().unet


def call(unet: Any, *, rows: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type:
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 32, generator=generator),
            "time_ids": torch.ones(rows, 6),
        }
    return given


def test_a_pass_with_fresh_features_is_the_full_pass_and_costs_less(unet: Any) -> None:
    given = call(unet)
    methods = {name: set(vars(module)) for name, module in unet.named_modules()}
    with torch.no_grad():
        with FlopCounterMode(display=False) as whole:
            wanted = unet(**given).sample
        costs = []
        for level, layers in [(0, 1), (0, 2), (1, 1)][: 2 * len(unet.down_blocks) - 1]:
            layers = min(layers, len(unet.down_blocks[level].resnets))
            cache = FeatureCache(unet, Cut(level, layers))
            with cache.keeping([("a", 2)], step=0):
                assert torch.equal(unet(**given).sample, wanted)
            with cache.reusing(["a"]), FlopCounterMode(display=False) as shallow:
                assert torch.equal(unet(**given).sample, wanted)
            costs.append(shallow.get_total_flops() / whole.get_total_flops())
    assert costs == sorted(costs) and costs[0] > 0 and costs[-1] < 1
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == methods


def test_every_cut_of_a_base_gives_the_full_pass(unet: Any) -> None:
    given = call(unet)
    with torch.no_grad():
        wanted = unet(**given).sample
        for level, block in enumerate(unet.down_blocks):
            for layers in range(1, min(len(block.resnets), len(unet.up_blocks[-1 - level].resnets) - 1) + 1):
                cache = FeatureCache(unet, Cut(level, layers))
                with cache.keeping([("a", 2)], step=0):
                    unet(**given)
                with cache.reusing(["a"]):
                    assert torch.equal(unet(**given).sample, wanted), (level, layers)


def test_reused_features_do_not_hear_the_new_call_but_the_shallow_part_does(unet: Any) -> None:
    one, other = call(unet), call(unet, seed=1)
    cache = FeatureCache(unet, Cut(0, 1))
    with torch.no_grad():
        with cache.keeping([("a", 2)], step=0):
            first = unet(**one).sample
        with cache.reusing(["a"]):
            got = unet(**other).sample
        fresh = unet(**other).sample
    assert not torch.allclose(got, first, atol=1e-3) and not torch.allclose(got, fresh, atol=1e-4)


def test_rows_of_one_batch_go_to_slots_of_their_own(unet: Any) -> None:
    one, other = call(unet, rows=1), call(unet, rows=2, seed=1)
    cache = FeatureCache(unet, Cut(0, 1))
    with torch.no_grad():
        wanted = {name: unet(**given).sample for name, given in (("a", one), ("b", other))}
        both = {name: torch.cat([one[name], other[name]]) for name in ("sample", "encoder_hidden_states")} | {
            "timestep": one["timestep"]
        }
        if "added_cond_kwargs" in one:
            both["added_cond_kwargs"] = {
                name: torch.cat([value, other["added_cond_kwargs"][name]])
                for name, value in one["added_cond_kwargs"].items()
            }
        with cache.keeping([("a", 1), ("b", 2)], step=0):
            unet(**both)
        for name, given in (("a", one), ("b", other)):
            with cache.reusing([name]):
                torch.testing.assert_close(unet(**given).sample, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deepest", [False, True])
def test_a_controlnets_residuals_reach_the_layers_that_are_computed(unet: Any, deepest: bool) -> None:
    given = call(unet)
    sizes: list[Any] = []

    with torch.no_grad():
        skips = [unet.conv_in(given["sample"])]
        handles = [
            block.register_forward_hook(lambda _, __, out: skips.extend(out[1])) for block in unet.down_blocks
        ]
        handles.append(unet.mid_block.register_forward_hook(lambda _, __, out: sizes.append(out.shape)))
        unet(**given)
        for handle in handles:
            handle.remove()
        residuals = {
            "down_block_additional_residuals": tuple(torch.full_like(skip, 0.1) for skip in skips),
            "mid_block_additional_residual": torch.full(sizes[0], 0.1),
        }
        wanted = unet(**given, **residuals).sample
        cache = FeatureCache(unet, Cut(len(unet.down_blocks) - 1 if deepest else 0, 1))
        with cache.keeping([("a", 2)], step=0):
            unet(**given, **residuals)
        with cache.reusing(["a"]):
            torch.testing.assert_close(unet(**given, **residuals).sample, wanted, rtol=1e-5, atol=1e-5)


def test_free_u_acts_once_on_kept_features(tiny_sd: Any) -> None:
    unet = tiny_sd().unet
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    given = call(unet)
    cache = FeatureCache(unet, Cut(2, 1))
    with torch.no_grad():
        wanted = unet(**given).sample
        with cache.keeping([("a", 2)], step=0):
            assert torch.equal(unet(**given).sample, wanted)
        for _ in range(2):
            with cache.reusing(["a"]):
                assert torch.equal(unet(**given).sample, wanted)


@pytest.mark.parametrize(
    ("cut", "says"), [(Cut(9, 1), "cut level must be from 0"), (Cut(0, 9), "cut layers must be from 1")]
)
def test_a_cut_that_the_base_does_not_have_is_refused(cut: Cut, says: str, tiny_sd: Any) -> None:
    with pytest.raises(CompositionError, match=says):
        FeatureCache(tiny_sd().unet, cut)
