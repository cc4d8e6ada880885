"""CLoRA: prompts broken down, attention maps, the contrastive loss and masks, each against its own oracle."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from studio.composition.attention import AttentionMaps
from studio.composition.call import Call
from studio.composition.concepts import Breakdown, break_down
from studio.composition.contrast import contrastive_loss, groups_of, masks_of
from studio.composition.engine import compose
from studio.composition.executor import Job
from studio.composition.methods.clora import Clora, CloraPlan, layers_to_watch
from studio.composition.plan import Branch, Step
from studio.errors import CompositionError
from studio.specs import parse_spec

TRIGGERS = {"fox": "sks", "owl": "tok owl"}
OPTIONS: dict[str, Any] = {"concepts": {"fox": "fox", "owl": "owl"}, "triggers": TRIGGERS}
PROMPT = "a fox, an owl"
REST = "rest of the picture"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # executors and ways of attention sum in other orders


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any, target: Any) -> dict[str, Any]:
    return {name: make_adapter(sd, seed, targets=[target["linear"]]) for seed, name in enumerate(TRIGGERS)}


def rows_of_words(text: str) -> int:
    return 2 + len(text.replace(",", " ,").split())


def test_a_prompt_is_broken_down_into_one_for_each_concept() -> None:
    found = break_down(
        "A cat, a dog", {"x": "dog", "y": "cat"}, {"x": "tok", "y": "big sks cat"}, rows_of_words
    )
    # start 0, then: A 1 cat 2 , 3 a 4 dog 5
    assert found.prompts == {"x": "A cat, a tok dog", "y": "A big sks cat, a dog"}
    assert found.base == {"x": (5,), "y": (2,)}
    assert found.concepts == {"x": {"x": (6,), "y": (2,)}, "y": {"x": (7,), "y": (4,)}}
    assert found.triggers == {"x": (5,), "y": (2, 3)}


def test_equal_words_are_shared_out_and_a_concept_may_be_its_own_trigger() -> None:
    found = break_down("a cat and a cat", {"x": "cat", "y": "cat"}, {"x": "cat", "y": "tok"}, rows_of_words)
    assert found.prompts == {"x": "a cat and a cat", "y": "a cat and a tok cat"}
    assert found.base == {"x": (2,), "y": (5,)}
    assert found.triggers == {"x": (), "y": (5,)}


@pytest.mark.parametrize(
    ("prompt", "concepts", "says"),
    [
        ("a category", {"x": "cat"}, "\"cat\" of 'x' is not in the prompt"),
        ("a cat", {"x": "cat", "y": "cat"}, "or another concept has it"),
    ],
)
def test_words_that_the_prompt_lacks_are_refused(prompt: str, concepts: Any, says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        break_down(prompt, concepts, {"x": "sks", "y": "tok"}, rows_of_words)


def test_words_that_would_be_cut_off_are_refused() -> None:
    with pytest.raises(CompositionError, match='too long with trigger words: "cat"'):
        break_down("a big cat", {"x": "cat"}, {"x": "tok"}, lambda text: min(rows_of_words(text), 5))


def test_the_loss_is_the_formula_of_infonce() -> None:
    generator = torch.Generator().manual_seed(1)
    groups = [[torch.rand(2, 3, 4, generator=generator) for _ in range(size)] for size in (3, 2, 4)]
    wanted = 0.0
    for picture in range(2):
        flat = [[each[picture].double().flatten() for each in group] for group in groups]

        def s(one: torch.Tensor, other: torch.Tensor) -> float:
            return math.exp(float(one @ other / (one.norm() * other.norm())) / 0.5)

        terms = []
        for group in flat:
            others = [each for other in flat if other is not group for each in other]
            for one in group:
                for alike in (each for each in group if each is not one):
                    up = s(one, alike)
                    terms.append(-math.log(up / (up + sum(s(one, each) for each in others))))
        wanted += sum(terms) / len(terms)
    assert float(contrastive_loss(groups, temperature=0.5)) == pytest.approx(wanted, rel=1e-5)


WORDS = Breakdown(
    {"x": "", "y": ""},
    base={"x": (1,), "y": (2,)},
    concepts={"x": {"x": (1,), "y": (3,)}, "y": {"x": (1,), "y": (3,)}},
    triggers={"x": (0, 2), "y": ()},
)


def test_masks_are_unions_over_words_and_overlaps_go_to_the_nearer() -> None:
    x, y = torch.zeros(1, 4, 1, 5), torch.zeros(1, 4, 1, 5)
    x[0, 1] = torch.tensor([[2.0, 0.9, 0.2, 0.2, 1.2]])  # the word's map under its own adapter
    x[0, 0], x[0, 2] = torch.tensor([[0.0, 0.0, 6.0, 0.2, 0.0]]), torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]])
    y[0, 3] = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.4]])
    masks = masks_of(WORDS, {"x": x, "y": y}, base="base", threshold=0.5)
    assert masks["x"].flatten().tolist() == [1, 0, 1, 0, 0]  # 2/2 beats 0.3/0.4, 4/4 alone, 1.2/2 loses
    assert masks["y"].flatten().tolist() == [0, 0, 0, 0, 1]
    assert masks["base"].flatten().tolist() == [0, 1, 0, 1, 0]


def test_groups_hold_the_maps_of_all_prompts_and_the_own_trigger() -> None:
    maps = {name: torch.rand(1, 4, 2, 2) for name in ("x", "y", "base")}
    one, other = groups_of(WORDS, maps, base="base")
    assert [each.tolist() for each in one] == [
        maps["base"][:, 1].tolist(),
        maps["x"][:, 1].tolist(),
        maps["y"][:, 1].tolist(),
        ((maps["x"][:, 0] + maps["x"][:, 2]) / 2).tolist(),
    ]
    assert len(other) == 3 and torch.equal(other[1], maps["x"][:, 3])


@contextmanager
def attended(unet: Any, layers: Any) -> Iterator[list[torch.Tensor]]:
    """Compute each layer's map ``[B, tokens, queries]`` from what its projections give."""
    seen: list[torch.Tensor] = []
    hooks = []
    for name in layers:
        module = unet.get_submodule(name)
        query: list[torch.Tensor] = []

        def attend(_: Any, __: Any, key: torch.Tensor, module: Any = module, query: Any = query) -> None:
            q, k = (each.unflatten(-1, (module.heads, -1)) for each in (query.pop(), key))
            scores = torch.einsum("bqhd,bthd->bhqt", q, k) / math.sqrt(q.shape[-1])
            seen.append(scores.softmax(-1).mean(1).mT)

        hooks.append(module.to_q.register_forward_hook(lambda _, __, out, query=query: query.append(out)))
        hooks.append(module.to_k.register_forward_hook(attend))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Spy(Clora):
    """CLoRA that keeps what its plan is shown."""

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        plan = super().prepare(*args, **kwargs)
        self.seen: list[Any] = []
        self.views: list[Any] = []
        spy = self

        class Watched(CloraPlan):
            def found(self, maps: Any) -> Any:
                spy.seen.append((dict(maps), super().found(maps)))
                return spy.seen[-1][1]

            def steered(self, view: Any) -> Any:
                moved = super().steered(view)
                spy.views.append((view, moved, self))
                return moved

        return Watched(**{field.name: getattr(plan, field.name) for field in fields(plan)})


def spy(**options: Any) -> Spy:
    return Spy(parse_spec(Clora.Options, {**OPTIONS, **options}))


def predicted(pipe: Any, draw: Any, prompt: str) -> torch.Tensor:
    """Return the first guided answer of the denoiser in a run."""
    seen: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watch(answer: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(answer.detach().clone())
        return step(answer, *args, **kwargs)

    pipe.scheduler.step = watch
    try:
        draw(pipe, steps=1, prompt=prompt)
    finally:
        del pipe.scheduler.step
    return seen[0]


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
def test_masks_alone_fuse_each_adapters_answer_to_its_own_prompt(
    batched: bool, sd: Any, pair: Any, draw: Any
) -> None:
    method = spy(contrast=False, mask_threshold=0.97)
    with compose(sd, pair, method=method, weights={"owl": 0.7}, batched=batched) as composition:
        got = predicted(sd, draw, PROMPT)
    assert composition.passes.full == 6
    ((maps, masks),) = method.seen
    assert {name: tuple(each.shape) for name, each in maps.items()} == dict.fromkeys(
        ("fox", "owl", REST), (1, 77, 8, 8)
    )
    prompts = {"fox": "a sks fox, an owl", "owl": "a fox, an tok owl", REST: PROMPT}
    wanted = torch.zeros(1, 4, 8, 8)
    layers = layers_to_watch([f"unet.{name}" for name, _ in sd.unet.named_parameters()], side=8)
    for region, prompt in prompts.items():
        own = {region: pair[region]} if region in pair else {}
        with (
            compose(sd, own, weights={"owl": 0.7} if region == "owl" else {}),
            attended(sd.unet, layers) as seen,
        ):
            alone = predicted(sd, draw, prompt)
        oracle = torch.stack(seen).mean(0)[1:].unflatten(-1, (8, 8))
        torch.testing.assert_close(maps[region], oracle, **CLOSE)
        wanted += masks[region] * alone
        assert 0 < float(masks[region].sum()) < 64
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_the_gradient_is_that_of_all_branches_together(
    sd: Any, pair: Any, draw: Any, target: Any, summed: Any
) -> None:
    method = spy(refinements=2, step_size=3.0)
    with compose(sd, pair, method=method) as composition:
        draw(sd, steps=1, prompt=PROMPT)
        texts = {name: composition._prompts.embeddings(name, guided=False).tokens for name in pair}
    view, moved, plan = method.views[0]
    timestep, words = sd.scheduler.timesteps[0], sd.encode_prompt(PROMPT, "cpu", 1, False)[0]
    layers = plan.watched
    copies = {REST: (deepcopy(sd.unet), words)}
    for name, adapter in pair.items():
        copies[name] = deepcopy(sd.unet), texts[name]
        own = copies[name][0].get_parameter(target["linear"].removeprefix("unet."))
        own.data = summed(sd, [(adapter, 1.0)]).float()
    latents = view.latents.clone()
    for _ in range(2):
        latents.requires_grad_()
        maps = {}
        for region, (unet, text) in copies.items():
            with attended(unet, layers) as seen:
                unet(latents, timestep, text)
            maps[region] = torch.stack(seen).mean(0).unflatten(-1, (8, 8))
        loss = contrastive_loss(groups_of(plan.words, maps, base=REST), temperature=0.5)
        (slope,) = torch.autograd.grad(loss, latents)
        assert float(slope.abs().max()) > 1e-5
        latents = (latents - 3.0 * slope).detach()
    torch.testing.assert_close(moved - view.latents, latents - view.latents, rtol=1e-3, atol=1e-6)
    # Twice two evaluations of three branches for one row, then all branches for both rows.
    assert composition.passes.full == 2 * 2 * 3 + 6


def test_the_gradient_asks_nothing_of_the_bases_own_weights(sd: Any, pair: Any, draw: Any) -> None:
    asked = []

    def noted(unet: Any, *_: Any) -> None:
        if torch.is_grad_enabled():
            asked.append(any(parameter.requires_grad for parameter in unet.parameters()))

    hook = sd.unet.register_forward_pre_hook(noted)
    # As loaded.
    sd.unet.requires_grad_(True)
    try:
        with compose(sd, pair, method="clora", options=OPTIONS | {"refinements": 1}):
            draw(sd, steps=1, prompt=PROMPT)
        assert asked and not any(asked)
        assert all(parameter.requires_grad for parameter in sd.unet.parameters())
    finally:
        hook.remove()
        sd.unet.requires_grad_(False)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_the_solver_goes_on_from_the_latents_that_the_denoiser_saw(
    scheduler: str, sd: Any, pair: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    monkeypatch.setattr(sd, "scheduler", getattr(diffusers, scheduler).from_config(sd.scheduler.config))
    given: list[torch.Tensor] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = sd.scheduler.step

    def watch(answer: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pairs.append((given[-1], sd.scheduler.scale_model_input(sample, timestep)))
        return step(answer, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(sd.scheduler, "step", watch)
    hook = sd.unet.conv_in.register_forward_pre_hook(lambda _, args: given.append(args[0][-1:].detach()))
    method = spy(step_size=1e3, refinements=1)
    with compose(sd, pair, method=method, batched=False):
        draw(sd, steps=4, prompt=PROMPT)
    hook.remove()
    for saw, went_on in pairs:
        torch.testing.assert_close(saw, went_on, **CLOSE)
    # Half of the four steps are steered, each once, however often the solver calls.
    assert [view.step.index for view, _, _ in method.views] == [0, 1, 2, 3]
    assert [moved is not None for _, moved, _ in method.views] == [True, True, False, False]
    assert float((method.views[0][1] - method.views[0][0].latents).abs().max()) > 1e-3


def test_of_an_inpainting_base_the_latents_alone_are_steered(sd: Any, pair: Any, draw: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config({**sd.unet.config, "in_channels": 9})
    components = {**sd.components, "unet": unet}
    pipe = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given: list[torch.Tensor] = []
    unet.conv_in.register_forward_pre_hook(lambda _, args: given.append(args[0][-1:].detach()))
    method = spy(step_size=1e3, refinements=1)
    picture = {"image": torch.rand(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64)}
    with compose(pipe, pair, method=method, batched=False):
        draw(pipe, steps=1, prompt=PROMPT, height=64, width=64, **picture)
    ((view, moved, _),) = method.views
    assert view.latents.shape == (1, 4, 8, 8) and not torch.equal(view.latents, moved)
    torch.testing.assert_close(given[-1][:, :4], moved, **CLOSE)
    assert all(torch.equal(each[:, 4:], given[0][:, 4:]) for each in given)


def test_updates_come_at_the_papers_iterations_and_end_half_way() -> None:
    plan = prepared(refinements=7)

    def updates(total: int) -> list[int]:
        return [plan.updates(Step(index, total, index / total)) for index in range(total)]

    counts = updates(50)
    assert {index for index, count in enumerate(counts) if count == 7} == {0, 10, 20}
    assert counts[:25].count(1) == 22 and not any(counts[25:])
    assert updates(10) == [7, 1, 7, 1, 7, 0, 0, 0, 0, 0]
    assert not any(prepared(contrast=False).updates(Step(index, 9, index / 9)) for index in range(9))
    assert prepared(contrast_until=0.9).updates(Step(8, 10, 0.8)) == 1


def prepared(**options: Any) -> CloraPlan:
    return Clora(parse_spec(Clora.Options, {**OPTIONS, **options})).prepare(
        dict.fromkeys(("fox", "owl")), {"fox": 1.0, "owl": 0.5}
    )


def test_everything_is_as_before_and_runs_repeat(
    sd: Any, pair: Any, draw: Any, snapshot: Any, make_adapter: Any, target: Any
) -> None:
    before, plain = snapshot(sd), draw(sd, steps=2)
    processors = dict(sd.unet.attn_processors)
    three = {**pair, "ink": make_adapter(sd, 7, targets=[target["linear"]])}
    drawn = []
    for options in ({}, {}, {"contrast": False}, {"shared_unconditional": True}, {"temperature": 0.1}):
        given = {**OPTIONS, "everywhere": ["ink"], "step_size": 1e3, "refinements": 1, **options}
        with compose(sd, three, method="clora", options=given) as composition:
            drawn.append(draw(sd, steps=1, prompt=PROMPT, num_images_per_prompt=2))
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.allclose(drawn[0], other, atol=1e-4) for other in drawn[2:])
    assert [row.weights[0] for row in composition.describe(1)] == pytest.approx([1 / 3, 1 / 3, 1.0])
    assert sd.unet.attn_processors == processors
    assert all("get_attention_scores" not in vars(module) for module in sd.unet.modules())
    assert all(torch.equal(before[name], value) for name, value in snapshot(sd).items())
    assert torch.equal(draw(sd, steps=2), plain)


def test_of_a_full_size_base_the_maps_of_16_by_16_are_read() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # that of SD 1.5
        unet.requires_grad_(False)
        layers = layers_to_watch([f"unet.{name}" for name, _ in unet.named_parameters()], side=64)
        places = [name.split(".transformer_blocks")[0] for name in layers]
        assert places == [
            *(f"down_blocks.2.attentions.{number}" for number in range(2)),
            *(f"up_blocks.1.attentions.{number}" for number in range(3)),
        ]
        maps = AttentionMaps(unet, layers)
        for size, seen in (((64, 64), (16, 16)), ((33, 50), (9, 13))):
            call = Call.bind(unet, (torch.zeros(2, 4, *size), 7, torch.zeros(2, 77, 768)), {})
            with maps.watching([Job(Branch({}, region="fox"), call)], guided=True):
                call.evaluate(unet.forward)
            assert maps.maps["fox"].shape == (1, 77, *seen)


@pytest.mark.parametrize(("side", "level"), [(8, 0), (16, 0), (32, 1), (96, 3), (512, 3)])
def test_smaller_bases_are_read_further_out(side: int, level: int) -> None:
    places = [
        f"{way}_blocks.{number}"
        for way, first in (("down", 0), ("up", 1))
        for number in range(first, first + 4)
    ]
    names = [f"unet.{place}.attentions.0.transformer_blocks.0.attn2.to_q.weight" for place in places]
    names.append("unet.down_blocks.4.resnets.0.conv1.weight")
    found = layers_to_watch(names, side=side)
    assert [name.split(".attentions")[0] for name in found] == [
        f"down_blocks.{level}",
        f"up_blocks.{4 - level}",
    ]


def test_what_cannot_be_composed_is_refused(sd: Any, tiny_sdxl: Any, pair: Any, draw: Any) -> None:
    with pytest.raises(CompositionError, match="'owl' has none of a concept and a place everywhere"):
        compose(sd, pair, method="clora", options={"concepts": {"fox": "fox"}, "triggers": TRIGGERS})
    with pytest.raises(CompositionError, match="trigger words of 'fox' are not known"):
        compose(sd, pair, method="clora", options={"concepts": OPTIONS["concepts"]})
    told = {
        name: replace(adapter, metadata={"modelspec.trigger_phrase": TRIGGERS[name]})
        for name, adapter in pair.items()
    }
    with compose(sd, told, method="clora", options={"concepts": OPTIONS["concepts"]}):
        with pytest.raises(CompositionError, match='"owl" of \'owl\' is not in the prompt "a fox"'):
            draw(sd, prompt="a fox")
        with pytest.raises(CompositionError, match="one prompt, got several"):
            sd([PROMPT, "a fox"], num_inference_steps=1, output_type="latent")
        with pytest.raises(CompositionError, match="pass the prompt as text"):
            sd(prompt_embeds=torch.zeros(1, 77, 32), guidance_scale=1.0, num_inference_steps=1)
    with (
        compose(sd, pair, method="clora", options=OPTIONS, modifiers={"cache": {}}),
        pytest.raises(CompositionError, match="Leave the cache out"),
    ):
        draw(sd, prompt=PROMPT)
    with pytest.raises(CompositionError, match=r"for SD 1\.x, the base is sdxl"):
        compose(tiny_sdxl(), pair, method="clora", options=OPTIONS)
