"""SaRA as a training method: options, the loop, undoing and files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sara_oracle import batch_loss, trainer_on
from torch import Tensor, nn

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.composition.engine import compose
from studio.data.dataset import read_dataset
from studio.errors import TrainingError
from studio.specs import Event, TrainSpec
from studio.trainers.evaluate import evaluate_loss
from studio.trainers.guard import Guard
from studio.trainers.loop import train
from studio.trainers.step import TrainStep

Base = Callable[[], Any]
Spec = Callable[..., TrainSpec]
GIVEN = {"data": "d", "output": "o.safetensors", "method": "sara"}


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Spec:
    """Return a function from changed fields to a short run of SaRA on the folder."""

    def build(**values: Any) -> TrainSpec:
        given = {
            "data": folder,
            "output": tmp_path / "out" / "dog.safetensors",
            "prompt": "sks dog",
            "method": "sara",
            "steps": 2,
            "quantile": 0.2,
            "warmup_steps": 0,
            "device": "cpu",
        }
        return TrainSpec.model_validate(given | values)

    return build


@contextmanager
def given_back(pipe: Any) -> Iterator[None]:
    """Assert that after the block all weights have their bits, places and flags, and no hooks."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = [weight for part in parts for weight in part.parameters()]
    before = [(weight.data_ptr(), weight.requires_grad, weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        for weight, (place, requires_grad, value) in zip(weights, before, strict=True):
            assert (weight.data_ptr(), weight.requires_grad, weight.grad) == (place, requires_grad, None)
            kind = {2: torch.int16, 4: torch.int32}[weight.element_size()]
            assert torch.equal(weight.detach().view(kind), value.view(kind))
            assert not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def values_of(adapter: Adapter) -> dict[str, Tensor]:
    return {name: change.values for name, change in adapter.changes.items()}  # type: ignore[attr-defined]


def same(first: Adapter, second: Adapter, *, tolerance: float = 0.0) -> bool:
    left, right = values_of(first), values_of(second)
    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape
        and torch.allclose(left[name], right[name], rtol=0, atol=tolerance)
        for name in left
    )


def test_the_loss_on_fixed_noise_falls_and_the_base_comes_back(tiny_sd: Base, run: Spec) -> None:
    pipe, spec = tiny_sd(), run(steps=25, learning_rate=1e-2, min_snr_gamma=None, reselect_at=0)
    pictures = read_dataset(spec).pictures
    before = evaluate_loss(pipe, pictures, num=8)
    with given_back(pipe):
        adapter = train(pipe, spec)
    assert evaluate_loss(pipe, pictures, adapter, num=8) < 0.9 * before
    assert evaluate_loss(pipe, pictures, num=8) == before


def test_the_same_spec_gives_the_same_adapter_with_samples_or_without(tiny_sd: Base, run: Spec) -> None:
    pipe, plain = tiny_sd(), []
    before = pipe.unet.conv_in.weight.detach().clone()

    def draw(given: Any, adapter: Adapter | None, specs: Any, paths: Any) -> list[Image.Image]:
        plain.append(torch.equal(given.unet.conv_in.weight, before))
        assert not any(weight.requires_grad for weight in given.unet.parameters())
        return [Image.new("RGB", (8, 8)) for _ in specs]

    first = train(pipe, run(steps=4))
    again = train(pipe, run(steps=4, sample_every=1, save_every=1, overwrite=True), sample=draw)
    assert same(first, again) and len(plain) >= 4 and all(plain)
    assert not same(first, train(pipe, run(steps=4, seed=1, overwrite=True)))


def test_accumulating_two_equals_a_batch_of_two(tiny_sd: Base, run: Spec) -> None:
    pipe = tiny_sd()
    together = train(pipe, run(steps=2, batch_size=2, reselect_at=0))
    accumulated = train(pipe, run(steps=2, batch_size=1, gradient_accumulation=2, reselect_at=0))
    # AdamW's first steps have the size of the rate whatever the gradient, so signs near zero may differ.
    differences = [
        (values_of(together)[name] - values).abs() for name, values in values_of(accumulated).items()
    ]
    assert torch.cat(differences).quantile(0.99) < 1e-5 < 1e-3 / 10


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train_text_encoder": True, "gradient_checkpointing": True},
        {"precision": "bf16"},
        {"selection": "random"},
        {"selection": "largest", "rank_term_on": "delta"},
    ],
    ids=["plain", "text-encoder-and-checkpointing", "bf16", "random", "largest-delta"],
)
def test_the_base_comes_back_bit_for_bit(tiny_sd: Base, run: Spec, values: dict[str, Any]) -> None:
    pipe = tiny_sd()
    # A zero with a sign and a tiny number have bits that adding and subtracting would lose.
    with torch.no_grad():
        pipe.unet.conv_in.weight.view(-1)[:2] = torch.tensor([-0.0, 1e-42])
    with given_back(pipe):
        train(pipe, run(**values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_trains_and_comes_back(tiny_sd: Base, run: Spec, dtype: torch.dtype) -> None:
    pipe = tiny_sd().to(dtype)
    with given_back(pipe):
        adapter = train(pipe, run())
    assert all(torch.isfinite(values).all() for values in values_of(adapter).values())
    # In the loop a 16-bit base is converted on the CPU; here its own tensors are written to.
    with given_back(pipe):
        trainer, _, optimizer = trainer_on(pipe, quantile=0.2)
        batch_loss(pipe, 1).backward()
        optimizer.step()
        moved = pipe.unet.conv_in.weight.detach().clone()
        trainer.release()
    assert not torch.equal(moved, pipe.unet.conv_in.weight)


def test_weights_in_channels_last_are_trained_and_undone_in_place(tiny_sd: Base) -> None:
    plain, last = tiny_sd(), tiny_sd()
    last.unet.to(memory_format=torch.channels_last)
    adapters = []
    for pipe in (plain, last):
        with given_back(pipe):
            trainer, _, optimizer = trainer_on(pipe, quantile=0.2)
            batch_loss(pipe, 1).backward()
            optimizer.step()
            moved = pipe.unet.conv_in.weight.detach().clone()
            adapters.append(trainer.export())
            trainer.release()
        assert not torch.equal(moved, pipe.unet.conv_in.weight)
    first, second = (adapter.changes["unet.conv_in.weight"] for adapter in adapters)
    assert torch.equal(first.indices, second.indices)  # type: ignore[attr-defined]


def test_the_base_comes_back_after_an_exception_and_after_a_sample_that_fails(
    tiny_sd: Base, run: Spec
) -> None:
    pipe = tiny_sd()

    def fail(*given: Any) -> Any:
        raise RuntimeError("from outside")

    def draw(adapter: Adapter | None, specs: Any) -> list[Any]:
        return fail() if adapter else [Image.new("RGB", (8, 8)) for _ in specs]

    with given_back(pipe), pytest.raises(RuntimeError, match="from outside"):
        train(pipe, run(train_text_encoder=True), on_event=lambda e: e.kind == "progress" and fail())
    with given_back(pipe), pytest.raises(RuntimeError, match="from outside"):
        train(
            pipe,
            run(steps=3, sample_every=1, overwrite=True),
            sample=lambda pipe, adapter, specs, paths: draw(adapter, specs),
        )


def test_a_breakdown_saves_the_last_good_adapter_also_right_after_reselection(
    tiny_sd: Base, run: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, forward = tiny_sd(), TrainStep.forward
    for broken in (3, 4):
        calls: list[int] = []

        def break_down(self: TrainStep, batch: Any, calls: Any = calls, broken: int = broken) -> Tensor:
            # The passes before the first step are over empty pictures.
            calls.extend([1] * bool(batch.noise.any()))
            return forward(self, batch) * (float("nan") if len(calls) == broken else 1.0)

        monkeypatch.setattr(TrainStep, "forward", break_down)
        words = rf"the loss is no longer finite at step {broken}\. Lower learning_rate \(now 0\.001, try"
        with given_back(pipe), pytest.raises(TrainingError, match=words):
            train(pipe, run(steps=6, reselect_at=2, schedule="constant", overwrite=True))
        path = tmp_path / "out" / "dog-run" / "adapters" / f"dog-last-good-{broken - 2:06d}.safetensors"
        rescued = load_adapter(path, base=pipe)
        monkeypatch.setattr(TrainStep, "forward", forward)
        good = train(
            pipe,
            run(steps=6, reselect_at=2, schedule="constant", overwrite=True),
            stop=iter([False] * (broken - 2) + [True]).__next__,
        )
        assert same(rescued, good)


def test_values_set_back_by_the_guard_reach_the_weights_at_the_next_export(tiny_sd: Base) -> None:
    pipe = tiny_sd()
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.2)
    guard = Guard([part.values])
    batch_loss(pipe, 1).backward()
    before = pipe.unet.conv_in.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(pipe.unet.conv_in.weight, before)
    guard.restore()
    trainer.export()
    assert torch.equal(pipe.unet.conv_in.weight, before)


def test_suspending_gives_the_base_and_then_the_trained_weights_back(tiny_sd: Base) -> None:
    pipe = tiny_sd()
    before = [weight.detach().clone() for weight in pipe.unet.parameters()]
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.2, reselect_at=1, steps=4)
    for step in (1, 2):
        batch_loss(pipe, step).backward()
        trainer.before_clipping(step)
        optimizer.step()
        optimizer.zero_grad()
    trained = [weight.detach().clone() for weight in pipe.unet.parameters()]
    asked = [weight.requires_grad for weight in pipe.unet.parameters()]
    with pytest.raises(RuntimeError, match="inside"), trainer.suspended():
        assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), before, strict=True))
        assert not any(weight.requires_grad for weight in pipe.unet.parameters())
        raise RuntimeError("inside")
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), trained, strict=True))
    assert [weight.requires_grad for weight in pipe.unet.parameters()] == asked
    batch_loss(pipe, 3).backward()
    assert part.values.grad is not None and part.values.grad.abs().max() > 0


@pytest.mark.parametrize("architecture", ["sd", "sdxl"])
def test_a_saved_and_composed_adapter_gives_the_trained_weights_bit_for_bit(
    tiny_sd: Base, tiny_sdxl: Base, run: Spec, tmp_path: Path, architecture: str
) -> None:
    pipe = (tiny_sd if architecture == "sd" else tiny_sdxl)()
    trained: list[dict[str, Tensor]] = []

    def look(event: Event) -> None:
        if event.kind == "progress" and event.step == 4:
            trained.append({name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()})

    adapter = train(pipe, run(steps=4, learning_rate=1e-2), on_event=look)
    assert adapter.kind == "sparse"
    path = save_adapter(adapter, tmp_path / "dog.safetensors", format="sara")
    loaded = load_adapter(path, base=pipe)
    with compose(pipe, {"dog": loaded}):
        composed = dict(pipe.unet.named_parameters())
        assert all(torch.equal(composed[name], weight) for name, weight in trained[0].items())
    assert not torch.equal(pipe.unet.conv_in.weight, trained[0]["conv_in.weight"])


def test_text_encoders_train_as_components_of_their_own(tiny_sdxl: Base, run: Spec) -> None:
    pipe, events = tiny_sdxl(), []
    with given_back(pipe):
        adapter = train(pipe, run(train_text_encoder=True), on_event=events.append)
    moved = {name.split(".")[0] for name, values in values_of(adapter).items() if values.abs().max() > 0}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    assert all(".text_model." in name for name in adapter.changes if name.startswith("text_encoder."))
    rates = next(event.values for event in events if event.kind == "progress")
    assert rates["text_encoder_2_learning_rate"] == pytest.approx(rates["learning_rate"] / 2)


def test_the_loops_reselection_is_at_half_the_steps_and_can_be_moved_or_turned_off(
    tiny_sd: Base, run: Spec
) -> None:
    pipe = tiny_sd()
    values = {"steps": 4, "learning_rate": 1e-2}
    half = train(pipe, run(**values))
    assert same(half, train(pipe, run(**values, reselect_at=2)))
    assert not same(half, train(pipe, run(**values, reselect_at=0)))
    assert not same(half, train(pipe, run(**values, reselect_at=1)))


@pytest.mark.parametrize(
    "values",
    [
        {"quantile": 0.1},
        {"threshold": 0.02, "quantile": None},
        {"selection": "largest"},
        {"selection": "random", "reselect_at": None},
        {"rank_weight": 0.0},
        {"rank_every": 2},
        {"rank_term_on": "delta"},
        {"train_text_encoder": True},
        {"max_grad_norm": 1e-4},
        {"weight_decay": 10.0},
        {"learning_rate": 2e-3},
    ],
    ids=str,
)
def test_each_option_changes_the_result(shared: Any, run: Spec, values: dict[str, Any]) -> None:
    pipe, plain = shared
    given = {"steps": 3, "reselect_at": 1, "rank_weight": 0.1}
    if not plain:
        plain.append(train(pipe, run(**given)))
    assert not same(plain[0], train(pipe, run(**given | values)))


@pytest.fixture(scope="module")
def shared(tiny_sd: Base) -> Any:
    """Return one base for many runs and a place for the adapter that all variations are compared with."""
    return tiny_sd(), []


def test_the_metadata_says_what_was_selected(tiny_sd: Base, run: Spec, tmp_path: Path) -> None:
    import json

    pipe = tiny_sd()
    adapter = train(pipe, run(steps=2, quantile=None))
    chosen = sum(len(values) for values in values_of(adapter).values())
    assert json.loads(adapter.metadata["studio.sara"]) == {
        "threshold": None, "quantile": 0.05, "selection": "smallest", "selected": chosen, "reselect_at": 1,
        "rank_weight": 5e-4, "rank_term_on": "parameter", "dtype": "float32",
    }  # fmt: skip
    assert adapter.metadata["ss_unet_lr"] == "0.001"
    path = save_adapter(adapter, tmp_path / "dog.safetensors", format="sara")
    assert "studio.sara" in read_header(path).metadata


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"reselect_at": 2}, r"reselect_at must be less than the 2 steps, got 2\. Lower it, or set it to 0"),
        ({"quantile": 1e-9}, r"nothing of the base is selected by quantile 1e-09\. Raise it"),
        ({"format": "diffusers"}, r"'sara' adapters cannot be written.*'diffusers'.*Choose.*'sara'"),
    ],
    ids=["late-reselect", "nothing-selected", "format"],
)
def test_runs_that_cannot_work_are_refused_before_any_work(
    tiny_sd: Base, run: Spec, values: dict[str, Any], words: str
) -> None:
    pipe, events = tiny_sd(), []
    with given_back(pipe), pytest.raises(TrainingError, match=words):
        train(pipe, run(**values), on_event=events.append)
    assert not any(event.kind == "progress" for event in events)
