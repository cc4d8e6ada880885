"""Textual inversion and pivotal tuning: what learns, what does not, and which files come of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import studio
from studio.adapters.files import load_adapter, read_header
from studio.errors import SpecError, TrainingError, UsageError
from studio.models.tokens import tokenizer_of
from studio.registry import TRAINERS
from studio.specs import TrainSpec, parse_spec
from studio.trainers.borrow import borrowed
from studio.trainers.learned_tokens import start_of
from studio.trainers.loop import train
from studio.trainers.token_options import TokenOptions

Factory = Callable[[], Any]


def spec_of(folder: Path, output: Path, **values: Any) -> TrainSpec:
    given = {
        "method": "textual-inversion",
        "token": "<toy>",
        "prompt": "a <toy>",
        "steps": 3,
        "batch_size": 2,
    }
    fixed = {"data": folder, "output": output / "toy.safetensors", "warmup_steps": 0, "device": "cpu"}
    return TrainSpec.model_validate(fixed | given | values)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    """Return a function from changed fields to a run in which every caption names the token."""
    (folder / "1.txt").write_text("a blue <toy>")
    return lambda **values: spec_of(folder, tmp_path / "out", **values)


def options(**values: Any) -> TokenOptions:
    return TokenOptions.model_validate({"token": "<toy>"} | values)


def rows(pipe: Any, component: str = "text_encoder") -> Tensor:
    weight: Tensor = getattr(pipe, component).get_input_embeddings().weight
    return weight.detach()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_only_the_new_rows_learn(
    request: pytest.FixtureRequest, run: Callable[..., TrainSpec], model: str
) -> None:
    pipe = request.getfixturevalue(model)()
    before = {
        (name, path): value.clone()
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        if (part := getattr(pipe, name, None)) is not None
        for path, value in part.state_dict().items()
    }
    spec = run(vectors=2, weight_decay=0.1)
    start = start_of(pipe, spec.options, seed=spec.seed)  # type: ignore[arg-type]
    adapter = train(pipe, spec)
    assert adapter.changes == {} and adapter.tokens.keys() == {"<toy>"}
    learned = adapter.tokens["<toy>"]
    assert learned.keys() == start.keys() and len(learned) == (2 if model == "tiny_sdxl" else 1)
    for component, value in learned.items():
        moved = (value - start[component]).abs()
        assert value.shape == (2, 32) and (moved > 0).all()
        assert moved.max() < 3 * 5e-3 * 1.01  # Adam moves each number by about the rate a step, at most.
    for (name, path), value in before.items():
        assert torch.equal(getattr(pipe, name).state_dict()[path], value), path
    assert "<toy>" not in pipe.tokenizer.get_vocab()


def test_a_step_is_adams_on_the_gradient_of_a_larger_embedding_table(tiny_sd: Factory) -> None:
    # The textbook way: a table with one more row, of which all other rows are ignored.
    pipe = tiny_sd()
    target = torch.randn((1, 77, 32), generator=torch.Generator().manual_seed(3))
    spec = TrainSpec.model_validate(
        {"method": "textual-inversion", "token": "<toy>", "data": "d", "output": "o.safetensors"}
    )
    start = start_of(pipe, options(), seed=0)["text_encoder"]
    table = torch.cat([rows(pipe), start])
    trainer = TRAINERS["textual-inversion"]()
    with borrowed(pipe, device=torch.device("cpu"), dtype=torch.float32):
        groups = trainer.prepare(pipe, spec)
        ids = pipe.tokenizer(["a <toy>"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert (ids == len(table) - 1).sum() == 1
        encoded = pipe.encode_prompt(["a <toy>"], "cpu", 1, False)[0]
        (encoded - target).square().mean().backward()
        (learned,) = groups[0].parameters
        trainer.optimizer(groups, weight_decay=0.5).step()
        after = learned.detach().clone()
        grad = learned.grad
        trainer.release()
    assert grad is not None
    # Adam's first step: rate times g / (|g| + eps), and no decay.
    wanted = start.double() - 5e-3 * grad.double() / (grad.double().abs() + 1e-8)
    assert torch.allclose(after.double(), wanted, atol=1e-7)  # fp32.
    module = pipe.text_encoder.get_input_embeddings()
    grown = torch.nn.Embedding.from_pretrained(table, freeze=False)
    pipe.text_encoder.set_input_embeddings(grown)
    try:
        output = pipe.text_encoder(ids, output_hidden_states=False)[0]
        (output - target).square().mean().backward()
    finally:
        pipe.text_encoder.set_input_embeddings(module)
    assert grown.weight.grad is not None
    assert torch.allclose(grown.weight.grad[-1:], grad, atol=1e-9)  # The same sums, perhaps in another order.


def test_the_start_is_that_of_the_words_over_and_over(tiny_sdxl: Factory) -> None:
    pipe = tiny_sdxl()
    found = start_of(pipe, options(init_words="to", vectors=3), seed=0)
    for component, value in found.items():
        ids = tokenizer_of(pipe, component)("to", add_special_tokens=False).input_ids
        own = rows(pipe, component)
        assert torch.equal(value, own[[ids[0], ids[1], ids[0]]])
    with pytest.raises(UsageError, match=r"init_words 'toy' are 3 tokens for this base .*the token has 2"):
        start_of(pipe, options(init_words="toy", vectors=2), seed=0)


def test_the_random_start_is_as_large_as_the_vocabulary_and_depends_on_the_seed(tiny_sd: Factory) -> None:
    pipe = tiny_sd()
    one, same, other = (start_of(pipe, options(vectors=64), seed=seed)["text_encoder"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    ratio = one.std() / rows(pipe).std()
    assert 0.9 < ratio < 1.1  # 2,048 draws: the spread is known within 2 %.


def test_pivotal_tuning_writes_the_layers_and_the_token_apart_and_both_act_together(
    run: Callable[..., TrainSpec], tiny_sd: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    monkeypatch.setattr("studio.bases.cached_base", lambda *_: pipe)
    files: dict[str, Path] = {}
    result = studio.train(
        run(method="lora", vectors=2, rank=2, save_every=2),
        on_event=lambda event: files.update({event.part: event.path} if event.kind == "saved" else {}),
    )
    assert {word: path.name for word, path in result.parts.items()} == {"token": "toy-token.safetensors"}
    assert files == {"": result.path, **result.parts}
    assert TRAINERS["lora"].companions == ("token",), "its own file lacks it"
    layers, token = load_adapter(result.path, base=pipe), load_adapter(result.parts["token"], base=pipe)
    assert layers.kind == "lora" and layers.changes and not layers.tokens
    assert token.kind == "textual-inversion" and not token.changes
    assert torch.equal(token.tokens["<toy>"]["text_encoder"], result.adapter.tokens["<toy>"]["text_encoder"])
    assert read_header(result.path).metadata["studio.token"] == "<toy>"
    on_the_way = sorted(path.name for path in (tmp_path / "out" / "toy-run" / "adapters").iterdir())
    assert on_the_way == ["toy-step-000002-token.safetensors", "toy-step-000002.safetensors"]
    with studio.compose(pipe, {"layers": layers, "token": token}):
        prompt = pipe.encode_prompt(["a <toy>"], "cpu", 1, False)[0]
    with studio.compose(pipe, {"all": result.adapter}):
        assert torch.equal(pipe.encode_prompt(["a <toy>"], "cpu", 1, False)[0], prompt)


def test_a_drawn_picture_can_name_a_token_from_a_file(
    run: Callable[..., TrainSpec], tiny_sd: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    monkeypatch.setattr("studio.bases.cached_base", lambda *_: pipe)
    result = studio.train(run(vectors=2))
    adapters: Mapping[str | Path, float] = {result.path: 1.0}
    shared: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}
    with_token = next(studio.generate_batch(["a <toy>"], adapters=adapters, **shared)).image
    without = next(studio.generate_batch(["a <toy>"], **shared)).image
    assert with_token.tobytes() != without.tobytes()
    # Of a prompt that is too long for one chunk the token's two vectors begin the next.
    both = [f"{'x ' * 74}<toy>", f"{'x ' * 74}BREAK <toy>"]
    pictures = [next(studio.generate_batch([text], adapters=adapters, **shared)).image for text in both]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert "<toy>" not in pipe.tokenizer.get_vocab()


def test_the_token_stays_as_it_is_after_its_share_of_the_steps(
    run: Callable[..., TrainSpec], tiny_sd: Factory
) -> None:
    def learned(steps: int, until: float) -> Any:
        values = {"method": "lora", "rank": 2, "schedule": "constant"}
        return train(tiny_sd(), run(**values, steps=steps, token_until=until, token_learning_rate=1e-2))

    half, whole, short = learned(4, 0.5), learned(4, 1.0), learned(2, 1.0)
    token = [each.tokens["<toy>"]["text_encoder"] for each in (half, whole, short)]
    assert torch.equal(token[0], token[2]) and not torch.equal(token[0], token[1])
    start = start_of(tiny_sd(), options(), seed=0)["text_encoder"]
    assert 1.5e-2 < (token[0] - start).abs().max() < 2.1e-2  # Two steps of Adam at 1e-2.
    name = next(iter(half.changes))
    assert not torch.equal(half.changes[name].up, short.changes[name].up)


def test_what_would_teach_nothing_or_cannot_be_written_is_refused_before_training(
    run: Callable[..., TrainSpec], tiny_sd: Factory
) -> None:
    pipe = tiny_sd()
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"token": "<other>"}, TrainingError, "no caption names the token '<other>'.*the first is"),
        ({"token": "a"}, UsageError, "the token 'a' exists already in the base model's vocabulary"),
        (
            {"vectors": 8, "prompt": "a <toy>", "max_token_length": 8},
            TrainingError,
            r"no caption names the token '<toy>' within max_token_length \(8\)",
        ),
        ({"init_words": "toy"}, UsageError, "init_words 'toy' are 3 tokens"),
        ({"format": "kohya"}, TrainingError, "cannot be written in the format 'kohya': it is a token"),
        ({"method": "lora", "format": "embedding"}, TrainingError, "in the format 'embedding': it holds one"),
    ]
    for values, error, words in refused:
        with pytest.raises(error, match=words):
            train(pipe, run(**values))
    assert "<toy>" not in pipe.tokenizer.get_vocab()


def test_options_about_a_token_need_one() -> None:
    paths = {"data": "d", "output": "o.safetensors"}
    for wrong in ({"vectors": 2}, {"init_words": "toy"}):
        with pytest.raises(SpecError, match=r"is about a new token. Give token, or leave it out"):
            parse_spec(TrainSpec, paths | wrong)
    with pytest.raises(SpecError, match="token: "):
        parse_spec(TrainSpec, paths | {"token": "two words"})
    assert parse_spec(TrainSpec, paths | {"vectors": 1}).options.vectors == 1  # type: ignore[attr-defined]


def test_weight_decay_acts_on_layers_and_not_on_the_token(tiny_sd: Factory) -> None:
    spec = TrainSpec.model_validate(
        {"token": "<toy>", "rank": 2, "data": "d", "output": "o.safetensors", "weight_decay": 0.3}
    )
    trainer = TRAINERS["lora"]()
    groups = trainer.prepare(tiny_sd(), spec)
    decays = [group["weight_decay"] for group in trainer.optimizer(groups, weight_decay=0.3).param_groups]
    trainer.release()
    assert decays == [0.3, 0.0]
    assert [(group.name, group.learning_rate) for group in groups] == [("unet", 1e-3), ("text_encoder", 5e-3)]
