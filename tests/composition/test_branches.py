"""Steps of several evaluations: their mean, their rows, their prompts, their regions, in every executor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from studio.composition.engine import compose
from studio.composition.mixing import Mixer
from studio.composition.plan import Branch, Composer, Plan, Step, Text
from studio.errors import CompositionError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # executors sum in other orders


@dataclass(frozen=True)
class FixedPlan(Plan):
    """The same branches at every step."""

    branches: tuple[Branch, ...]

    def at(self, step: Step) -> Sequence[Branch]:
        return self.branches


class Fixed(Composer):
    """A composer whose branches are given."""

    def __init__(self, *branches: Branch, **more: Any) -> None:
        super().__init__()
        self.branches, self.more = branches, more

    def prepare(self, adapters: Any, weights: Any, base: Any = None, request: Any = None) -> Plan:
        return FixedPlan(tuple(adapters), branches=self.branches, **{"text_weights": {}, **self.more})


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any) -> dict[str, Any]:
    return {"one": make_adapter(sd, 1), "two": make_adapter(sd, 2)}


def answers(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return pipe.unet(**inputs, return_dict=False)[0]


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Return a call of the denoiser: two unconditional rows, then two conditional ones."""
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(4, 4, 8, 8, generator=generator),
    }


class Asked:
    """Stands at the denoiser's inside and keeps what comes out for a call, guided or not."""

    def __init__(self, pipe: Any, *, guided: bool) -> None:
        self.pipe, self.guided = pipe, guided

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        prompts = ["a fox", "a cat"] if self.guided else ["a fox", "a cat", "a dog", "ink"]
        tokens, negative = self.pipe.encode_prompt(prompts, "cpu", 1, self.guided)
        words = torch.cat([negative, tokens]) if self.guided else tokens
        self.pipe.scheduler.set_timesteps(1)
        given = {"timestep": self.pipe.scheduler.timesteps[0], "encoder_hidden_states": words}
        return answers(self.pipe, {**inputs, **given})


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
def test_composite_is_the_weighted_mean_of_the_adapters_answers(
    batched: bool, guided: bool, sd: Any, pair: Any, inputs: Any
) -> None:
    ask = Asked(sd, guided=guided)
    alone = []
    for name, adapter in pair.items():
        with compose(sd, {name: adapter}, weights={name: 0.8}):
            alone.append(ask(inputs).double())
    base = ask(inputs).double()
    options = {"shares": {"one": 3.0}}
    with compose(
        sd, pair, method="composite", options=options, weights={"one": 0.8, "two": 0.8}, batched=batched
    ) as composition:
        got = ask(inputs)
    wanted = 0.75 * alone[0] + 0.25 * alone[1]
    torch.testing.assert_close(got.double(), wanted, **CLOSE)
    assert float((alone[0] - alone[1]).abs().mean()) > 1e-3 < float((wanted - base).abs().mean())
    assert composition.passes.full == 8 and composition.passes.shallow == 0


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "loop"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_composite_of_copies_is_the_adapter(
    batched: bool, guidance: float, sd: Any, make_adapter: Any, draw: Any
) -> None:
    copies = {name: make_adapter(sd, 1) for name in ("one", "two", "three")}
    with compose(sd, {"one": copies["one"]}):
        wanted = draw(sd, steps=3, guidance_scale=guidance)
    with compose(sd, copies, method="composite", batched=batched):
        torch.testing.assert_close(draw(sd, steps=3, guidance_scale=guidance), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regional", [False, True], ids=["shares", "regions"])
def test_answers_of_16_bits_are_rounded_once(regional: bool) -> None:
    shares = (0.3, 0.3, 0.4)
    branches = [Branch({}, share=share, region="all" if regional else None) for share in shares]
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randn(2, 4, 8, 8, generator=generator).bfloat16() for _ in shares]
    got = Mixer().mixed(branches, answers, guided=False, regions={"all": torch.ones(1, 1, 4, 4)})
    wanted = sum(share * answer.double() for share, answer in zip(shares, answers, strict=True))
    assert got.dtype == torch.bfloat16
    # Half a unit in the last of 8 places, and what fp32 sums are off.
    assert bool(((got.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all())


def test_the_executors_agree_on_a_picture_and_restore_everything(
    sd: Any, pair: Any, draw: Any, snapshot: Any
) -> None:
    before, plain = snapshot(sd), draw(sd, steps=3)
    methods = set(vars(sd.unet)), set(vars(sd))
    drawn = []
    for batched in (True, False):
        with compose(sd, pair, method="composite", batched=batched):
            drawn.append(draw(sd, steps=3))
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)  # three steps of it
    assert not torch.allclose(drawn[0], plain, atol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in snapshot(sd).items())
    assert (set(vars(sd.unet)), set(vars(sd))) == methods
    assert torch.equal(draw(sd, steps=3), plain)


def test_adapters_without_low_rank_are_evaluated_one_after_the_other(
    sd: Any, pair: Any, make_adapter: Any, draw: Any, target: Any
) -> None:
    from dataclasses import replace

    from studio.adapters.kinds.full import FullChange

    dense = {
        name: FullChange(change.delta(torch.zeros(change.shape), weight=1.0))
        for name, change in pair["two"].changes.items()
    }
    mixed = {"one": pair["one"], "two": replace(pair["two"], kind="full", changes=dense)}
    drawn = []
    for adapters in (pair, mixed):
        with compose(sd, adapters, method="composite"):
            drawn.append(draw(sd, steps=2))
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_too_large_falls_back_to_the_loop_and_says_so_once(
    sd: Any, pair: Any, draw: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compose(sd, pair, method="composite", batched=False):
        wanted = draw(sd, steps=3)
    rows: list[int] = []
    # After most of the work, when the layers already have each row's changes.
    forward = sd.unet.conv_out.forward

    def narrow(sample: torch.Tensor) -> torch.Tensor:
        rows.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("no memory for it")
        return forward(sample)

    monkeypatch.setattr(sd.unet.conv_out, "forward", narrow)
    with compose(sd, pair, method="composite") as composition:
        assert torch.equal(draw(sd, steps=3), wanted)
        assert torch.equal(draw(sd, steps=3), wanted)
    assert rows == [4] + [2] * 12
    assert composition.passes.full == 24
    assert sum("one after the other" in record.message for record in caplog.records) == 1


def test_rows_that_no_branch_answers_for_take_the_conditional_answer(sd: Any, pair: Any, inputs: Any) -> None:
    ask = Asked(sd, guided=True)
    with compose(sd, {"one": pair["one"]}):
        whole = ask(inputs)
    with compose(sd, pair, method=Fixed(Branch({"one": 1.0}, "conditional"))) as composition:
        got = ask(inputs)
    torch.testing.assert_close(got, torch.cat([whole[2:], whole[2:]]), **CLOSE)
    assert composition.passes.full == 2


def test_an_adapter_may_act_on_the_unconditional_rows_alone(sd: Any, pair: Any, inputs: Any) -> None:
    ask = Asked(sd, guided=True)
    base = ask(inputs)
    with compose(sd, {"one": pair["one"]}):
        whole = ask(inputs)
    branches = Branch({}, "conditional"), Branch({"one": 1.0}, "unconditional")
    with compose(sd, pair, method=Fixed(*branches)):
        torch.testing.assert_close(ask(inputs), torch.cat([whole[:2], base[2:]]), **CLOSE)


def test_a_shared_unconditional_answer_is_the_bases(sd: Any, pair: Any, inputs: Any) -> None:
    ask = Asked(sd, guided=True)
    base = ask(inputs)
    with compose(sd, pair, method="composite"):
        both = ask(inputs)
    with compose(sd, pair, method="composite", options={"shared_unconditional": True}) as composition:
        torch.testing.assert_close(ask(inputs), torch.cat([base[:2], both[2:]]), **CLOSE)
    assert composition.passes.full == 6


@pytest.mark.parametrize("build", ["short_sd", "short_sdxl"])
def test_each_branch_may_have_the_prompt_embeddings_of_its_own_text_encoder(
    build: str, request: pytest.FixtureRequest, make_adapter: Any, draw: Any, target: Any
) -> None:
    pipe = request.getfixturevalue(build)()
    first = {"short_sd": None, "short_sdxl": [target["linear"]]}[build]
    more = {} if first is None else {"targets": first}
    pair = {
        "one": make_adapter(pipe, 1, text=True, **more),
        "two": make_adapter(pipe, 2, text=True, **more),
    }
    # An adapter of the text encoder alone: the oracle is the mean of two runs of a single step.
    spoken = {name: without_denoiser(adapter) for name, adapter in pair.items()}
    alone = []
    for name, adapter in spoken.items():
        with compose(pipe, {name: adapter}):
            alone.append(predicted(pipe, draw))
    base = predicted(pipe, draw)
    with compose(pipe, spoken, method="composite", options={"text_encoder_policy": "own"}):
        got = predicted(pipe, draw)
    torch.testing.assert_close(got, sum(alone) / 2, **CLOSE)
    assert float((alone[0] - base).abs().max()) > 1e-4 < float((alone[0] - alone[1]).abs().max())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_prompt_is_encoded_once_for_each_text_encoder_state_and_not_at_each_step(
    steps: int, sd: Any, pair: Any, draw: Any
) -> None:
    encoded: list[int] = []
    handle = sd.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    with compose(sd, pair, method="composite", options={"text_encoder_policy": "own"}):
        draw(sd, steps=steps)
    handle.remove()
    # The pipeline's own embeddings and each adapter's, of the prompt and of the negative one.
    assert len(encoded) == (1 + len(pair)) * 2


def without_denoiser(adapter: Any) -> Any:
    from dataclasses import replace

    kept = {name: change for name, change in adapter.changes.items() if not name.startswith("unet.")}
    return replace(adapter, changes=kept)


def predicted(pipe: Any, draw: Any) -> torch.Tensor:
    """Return the first guided answer of the denoiser in a run."""
    seen: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watch(answer: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(answer.detach().clone())
        return step(answer, *args, **kwargs)

    pipe.scheduler.step = watch
    try:
        draw(pipe, steps=1)
    finally:
        del pipe.scheduler.step
    return seen[0]


def test_a_branch_may_say_something_else(sd: Any, draw: Any) -> None:
    wanted = draw(sd, steps=2, prompt="a cat", negative_prompt="fog")
    plan = Fixed(Branch({}, text="cat"), texts={"cat": Text({}, prompt="a cat")})
    with compose(sd, {}, method=plan):
        got = draw(sd, steps=2, prompt="a fox", negative_prompt="fog")
    assert torch.equal(got, wanted)


def test_a_prompt_encoded_elsewhere_is_said_where_branches_have_their_own(sd: Any, draw: Any) -> None:
    embeddings = sd.encode_prompt("a fox", "cpu", 1, False)[0]
    plan = Fixed(Branch({}, text="cat"), texts={"cat": Text({}, prompt="a cat")})
    with compose(sd, {}, method=plan), pytest.raises(CompositionError, match="pass the prompt as text"):
        sd(prompt_embeds=embeddings, guidance_scale=1.0, num_inference_steps=1, output_type="latent")


def test_regions_decide_pixel_by_pixel(sd: Any, pair: Any, inputs: Any) -> None:
    ask = Asked(sd, guided=True)
    alone = {}
    for name, adapter in pair.items():
        with compose(sd, {name: adapter}):
            alone[name] = ask(inputs)
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    branches = Branch({"one": 1.0}, region="left"), Branch({"two": 1.0}, region="right")
    regions = {"left": left, "right": 1 - left}
    with compose(sd, pair, method=Fixed(*branches, regions=regions)):
        got = ask(inputs)
    torch.testing.assert_close(got[..., :4], alone["one"][..., :4], **CLOSE)
    torch.testing.assert_close(got[..., 4:], alone["two"][..., 4:], **CLOSE)
    with (
        compose(sd, pair, method=Fixed(branches[0], regions=regions)),
        pytest.raises(CompositionError, match="leave a part of the picture"),
    ):
        ask(inputs)


@pytest.mark.parametrize(
    ("branches", "says"),
    [
        ((Branch({}, share=0.5),), "sum to 0.5"),
        ((Branch({}, "unconditional"),), "conditional rows at evaluation 1 sum to 0"),
        ((Branch({}, text="sea"),), "names the text 'sea'"),
        ((Branch({}, region="sea"),), "names the region 'sea'"),
    ],
)
def test_branches_that_make_no_answer_are_refused_before_the_first_step(
    branches: Any, says: str, sd: Any, draw: Any
) -> None:
    with compose(sd, {}, method=Fixed(*branches)), pytest.raises(CompositionError, match=says):
        draw(sd, steps=1)


@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_adapters_act_on_weights_that_are_offloaded_layer_by_layer(
    method: str, short_sd: Any, make_adapter: Any, draw: Any
) -> None:
    from accelerate import cpu_offload

    pipe = short_sd()
    pair = {"one": make_adapter(pipe, 1), "two": make_adapter(pipe, 2)}
    options = {"switch_every": 1} if method == "switch" else {}
    with compose(pipe, pair, method=method, weights={"one": 0.7}, options=options):
        wanted = draw(pipe, steps=3)
    base = draw(pipe, steps=3)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    with compose(pipe, pair, method=method, weights={"one": 0.7}, options=options):
        torch.testing.assert_close(draw(pipe, steps=3), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe, steps=3), base)
