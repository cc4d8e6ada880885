"""What steers a run without weights of its own: Decor, Sine and negative adapters."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.full import FullChange
from studio.composition.engine import compose
from studio.composition.methods.sine import Sine
from studio.composition.modifiers.decor import Decor
from studio.composition.modifiers.negative import Negative
from studio.composition.plan import Step, Suppression, Text
from studio.composition.projection import projected_out
from studio.errors import CompositionError, UsageError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # branches are summed in another order


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any) -> dict[str, Any]:
    return {"one": make_adapter(sd, 1, text=True), "two": make_adapter(sd, 2, text=True)}


def test_projected_rows_have_nothing_of_the_unwanted_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, unwanted = torch.randn(2, 7, 16, generator=generator), torch.randn(3, 16, generator=generator)
    orthogonal, _ = torch.linalg.qr(unwanted.double().mT)
    wanted = rows.double() - rows.double() @ orthogonal @ orthogonal.mT
    got = projected_out(rows, unwanted, Suppression("x", keep_length=False))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)  # fp32 against fp64
    half = projected_out(rows, unwanted, Suppression("x", strength=0.5, keep_length=False))
    torch.testing.assert_close(half.double(), (wanted + rows) / 2, rtol=1e-5, atol=1e-5)
    long = projected_out(rows, unwanted, Suppression("x"))
    torch.testing.assert_close(long.norm(dim=-1), rows.norm(dim=-1))
    one = projected_out(rows, unwanted, Suppression("x", rank=1, keep_length=False))
    assert torch.linalg.matrix_rank((rows - one)[0], atol=1e-4) == 1


def test_decor_changes_the_picture_and_strength_0_does_not(sd: Any, pair: Any, draw: Any) -> None:
    with compose(sd, pair):
        plain = draw(sd, steps=2)
    drawn = []
    for strength in (0.0, 1.0):
        modifiers = {"decor": {"words": "house", "strength": strength}}
        with compose(sd, pair, modifiers=modifiers):
            drawn.append(draw(sd, steps=2))
    torch.testing.assert_close(drawn[0], plain, **CLOSE)
    assert float((drawn[1] - plain).abs().max()) > 1e-3


def test_decor_is_the_pipeline_with_projected_embeddings(sd: Any, draw: Any) -> None:
    tokens, negative = sd.encode_prompt("a fox", "cpu", 1, True)
    unwanted = sd.encode_prompt("house", "cpu", 1, False)[0][0, 1:6]
    projected = projected_out(tokens, unwanted, Suppression("house"))
    wanted = sd(
        prompt_embeds=projected,
        negative_prompt_embeds=negative,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    with compose(sd, {}, modifiers={"decor": {"words": "house"}}):
        torch.testing.assert_close(draw(sd, steps=2), wanted, **CLOSE)


def test_decor_reaches_the_branches_own_prompts_too() -> None:
    inner = Sine(Sine.Options(source="a cat")).prepare({"one": None}, {"one": 1.0})
    plan = Decor(Decor.Options(words="house")).modify(inner, {}, {})
    assert plan.texts["source"].without == plan.texts["decor"].without == Suppression("house")
    with pytest.raises(CompositionError, match="can be used once"):
        Decor(Decor.Options(words="tree")).modify(plan, {}, {})


def test_negative_adapters_are_absent_from_the_conditional_answer(sd: Any, pair: Any, draw: Any) -> None:
    modifiers = {"negative": {"adapters": ["two"]}}
    with compose(sd, {"one": pair["one"]}):
        unguided, guided = draw(sd, steps=2, guidance_scale=1.0), draw(sd, steps=2)
    with compose(sd, pair, modifiers=modifiers) as composition:
        torch.testing.assert_close(draw(sd, steps=2, guidance_scale=1.0), unguided, **CLOSE)
        before = composition.passes.full
        steered = draw(sd, steps=2)
    assert float((steered - guided).abs().max()) > 1e-3
    assert composition.passes.full - before == 4
    plan = Negative(Negative.Options(adapters=("two",))).modify(composition.plan.inner, pair, {"two": 0.5})
    (row,) = plan.describe(3)
    assert row.adapter == "one" and row.weights == (1.0, 1.0, 1.0)
    with pytest.raises(CompositionError, match=r"Did you mean 'two'"):
        compose(sd, pair, modifiers={"negative": {"adapters": ["tow"]}})


@pytest.mark.parametrize("build", ["short_sd", "short_sdxl"])
def test_the_negative_prompt_is_encoded_with_the_negative_adapters(
    build: str, request: pytest.FixtureRequest, make_adapter: Any, target: Any, draw: Any
) -> None:
    pipe = request.getfixturevalue(build)()
    adapters = {
        name: make_adapter(pipe, seed, targets=[target["text"]]) for seed, name in enumerate(("one", "two"))
    }
    spoken = {}
    for names in (["one"], ["one", "two"]):
        with compose(pipe, {name: adapters[name] for name in names}):
            spoken[names[-1]] = pipe.encode_prompt(
                "a fox",
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt="fog",
            )
    (tokens, _, *pooled), (_, negative, *negative_pooled) = spoken["one"], spoken["two"]
    assert not torch.equal(negative, spoken["one"][1])
    given = {"prompt_embeds": tokens, "negative_prompt_embeds": negative}
    if pooled:
        given |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": negative_pooled[1]}
    wanted = draw(pipe, steps=2, prompt=None, **given)
    with compose(pipe, adapters, modifiers={"negative": {"adapters": ["two"]}}):
        got = draw(pipe, steps=2, negative_prompt="fog")
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("method", "options", "modifiers"),
    [
        ("cmlora", {"roles": {"one": "high", "three": "low"}, "interval": 3}, {}),
        ("composite", {}, {"cache": {"interval": 2, "full_first": 0, "full_last": 0}}),
        ("merge", {}, {"cache": {"interval": 2, "full_first": 0, "full_last": 0}}),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["cache-first", "negative-first"])
def test_a_negative_adapter_of_weight_0_changes_nothing_of_what_caches(
    method: str, options: Any, modifiers: Any, before: bool, sd: Any, make_adapter: Any, draw: Any
) -> None:
    adapters = {name: make_adapter(sd, seed) for seed, name in enumerate(("one", "three", "two"), 1)}
    own = {name: adapters[name] for name in ("one", "three")}
    with compose(sd, own, method=method, options=options, modifiers=modifiers) as composition:
        plain = draw(sd, steps=8)
        assert composition.passes.shallow
    negative = {"negative": {"adapters": ["two"]}}
    given = {**modifiers, **negative} if before else {**negative, **modifiers}
    with compose(
        sd, adapters, weights={"two": 0.0}, method=method, options=options, modifiers=given
    ) as composition:
        torch.testing.assert_close(draw(sd, steps=8), plain, **CLOSE)
        assert composition.passes.shallow


def test_one_adapter_cannot_be_pinned_and_negative(sd: Any, pair: Any) -> None:
    modifiers = {"pin": {"adapters": ["two"]}, "negative": {"adapters": ["two"]}}
    with pytest.raises(CompositionError, match="'two' is given to two modifiers"):
        compose(sd, pair, modifiers=modifiers).__enter__()


@pytest.mark.parametrize("modifiers", [["cache"], "cache", {"cache": "interval=3"}])
def test_modifiers_in_another_form_are_refused_in_one_line(sd: Any, pair: Any, modifiers: Any) -> None:
    with pytest.raises(UsageError, match="by name"):
        compose(sd, pair, modifiers=modifiers).__enter__()


def test_branches_of_their_own_prompts_have_negative_ones_too() -> None:
    inner = Sine(Sine.Options(source="a cat")).prepare({"one": None}, {"one": 1.0})
    spoken = Adapter("two", "full", {"text_encoder.weight": FullChange(torch.zeros(1))})
    plan = Negative(Negative.Options(adapters=("two",))).modify(inner, {"two": spoken}, {"two": 0.5})
    assert plan.texts == {
        **inner.texts,
        "negative": Text({"two": 0.5}),
        "negative of source": Text({"one": 1.0, "two": 0.5}),
    }
    assert [branch.text for branch in plan.at(Step(0, 4, 0.0))] == [None, "source", "negative"]


@pytest.mark.parametrize(
    "how",
    [
        {"modifiers": {"negative": {"adapters": ["two"]}}},
        {
            "method": "w-switch",
            "options": {"triggers": {"one": "a", "two": "cat"}, "switch_every": 1, "final_steps": 0},
        },
    ],
    ids=["negative", "w-switch"],
)
def test_a_pipeline_beside_the_composed_one_is_said_where_what_acts_depends_on_its_prompt(
    how: dict[str, Any], sd: Any, pair: Any, draw: Any
) -> None:
    other = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = {"image": torch.zeros(1, 3, 64, 64), "strength": 0.5, "steps": 4}
    with compose(sd, pair, **how):
        draw(sd, steps=2)
        with pytest.raises(CompositionError, match=r"Give compose\(\) the pipeline that you call"):
            draw(other, prompt="a cat", **image)
        # What the composed pipeline has encoded may go to any.
        tokens, negative = sd.encode_prompt("a cat", "cpu", 1, True)
        given = {"prompt_embeds": tokens, "negative_prompt_embeds": negative}
        got = draw(other, prompt=None, **given, **image)
    with compose(other, pair, **how):
        assert torch.equal(draw(other, prompt="a cat", **image), got)


def test_sine_is_its_formula(sd: Any, pair: Any, draw: Any) -> None:
    """One step, whose guided answer is recomputed from three plain ones."""
    scale, share = 4.0, 0.7
    noise = {"steps": 1, "guidance_scale": 1.0}
    base, empty = predicted(sd, draw, **noise), predicted(sd, draw, prompt="", **noise)
    with compose(sd, pair):
        tuned = predicted(sd, draw, prompt="a cat", **noise)
    options = {"source": "a cat", "base_share": share}
    with compose(sd, pair, method="sine", options=options):
        got = draw(sd, steps=1, guidance_scale=scale)
    wanted = scale * (share * base + (1 - share) * tuned) + (1 - scale) * empty
    torch.testing.assert_close(got, stepped(sd, wanted), rtol=1e-3, atol=1e-3)


def predicted(pipe: Any, draw: Any, **settings: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda _, __, out: seen.append(out[0].clone()))
    draw(pipe, **settings)
    handle.remove()
    return seen[0]


def stepped(pipe: Any, answer: torch.Tensor) -> torch.Tensor:
    """Return the latents after one step with an answer, from the noise that ``draw`` starts with."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(1)
    return pipe.scheduler.step(answer, pipe.scheduler.timesteps[0], noise).prev_sample


def test_sine_leaves_the_rest_of_the_run_to_the_base() -> None:
    plan = Sine(Sine.Options(source="a cat", until=0.5)).prepare({"one": None}, {"one": 1.0})
    assert [len(plan.at(Step(index, 4, index / 4))) for index in range(4)] == [3, 3, 1, 1]
    with pytest.raises(CompositionError, match="got no adapters"):
        Sine(Sine.Options(source="a cat")).prepare({}, {})
    with pytest.raises(CompositionError, match="trigger words of 'one' are not known"):
        Sine().prepare({"one": None}, {"one": 1.0})
