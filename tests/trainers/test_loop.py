from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter
from studio.data.dataset import read_dataset
from studio.errors import TrainingError, UsageError
from studio.specs import Event, GenerateSpec, TrainSpec
from studio.trainers.evaluate import evaluate_loss
from studio.trainers.loop import train

Spec = Callable[..., TrainSpec]
SEED = 3
"""One whose first timesteps are few enough for min-SNR weights other than 1."""


def factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (change.down, change.up) for name, change in adapter.changes.items()}  # type: ignore[attr-defined]


def same(first: Adapter, second: Adapter, *, tolerance: float = 0.0) -> bool:
    left, right = factors(first), factors(second)
    return list(left) == list(right) and all(
        torch.allclose(a, b, rtol=0, atol=tolerance)
        for name in left
        for a, b in zip(left[name], right[name], strict=True)
    )


def networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@contextmanager
def given_back(pipe: Any) -> Iterator[None]:
    """Assert that after the block the pipeline is as before: names, objects, storages, values, flags."""

    def state() -> list[Any]:
        found: list[Any] = []
        for name, part in networks(pipe).items():
            found.append(
                (name, sorted(vars(part)), [(path, type(module)) for path, module in part.named_modules()])
            )
            found.append(
                [
                    (path, id(p), p.data_ptr(), p.dtype, p.device, p.requires_grad)
                    for path, p in part.named_parameters()
                ]
            )
            found.append([(path, b.data_ptr(), b.dtype) for path, b in part.named_buffers()])
            found.append([(m.training, getattr(m, "gradient_checkpointing", None)) for m in part.modules()])
        return found

    before = state()
    values = {
        (name, path): p.detach().clone()
        for name, part in networks(pipe).items()
        for path, p in part.named_parameters()
    }
    try:
        yield
    finally:
        assert state() == before
        for name, part in networks(pipe).items():
            assert all(
                p.grad is None and torch.equal(p, values[name, path]) for path, p in part.named_parameters()
            )


def test_the_loss_on_fixed_noise_falls(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, run = tiny_sd(), spec(steps=25, learning_rate=1e-2, rank=8, targets="all", min_snr_gamma=None)
    pictures = read_dataset(run).pictures
    before = evaluate_loss(pipe, pictures, num=8)
    with given_back(pipe):
        adapter = train(pipe, run)
        after = evaluate_loss(pipe, pictures, adapter, num=8)
    assert after < 0.9 * before
    assert evaluate_loss(pipe, pictures, num=8) == before


def test_evaluation_does_not_depend_on_its_batch_size(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, pictures = tiny_sd(), read_dataset(spec()).pictures
    assert evaluate_loss(pipe, pictures, num=5, batch_size=2) == pytest.approx(
        evaluate_loss(pipe, pictures, num=5, batch_size=5),
        rel=1e-5,  # sums in another order
    )
    assert evaluate_loss(pipe, pictures, num=5, seed=1) != evaluate_loss(pipe, pictures, num=5)


def test_the_same_spec_and_seed_give_identical_tensors(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe = tiny_sd()
    run = spec(dropout=0.2, flip=True, center_crop=False, caption_dropout=0.3, train_text_encoder=True)
    first = train(pipe, run)
    torch.manual_seed(99)
    again = train(pipe, run)
    assert same(first, again) and first.metadata == again.metadata
    assert not same(first, train(pipe, spec(**run.model_dump(exclude={"seed", "method"}), seed=1)))


def test_the_callers_random_state_is_left_alone(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tiny_sd(), spec(steps=1, dropout=0.5))
    assert torch.equal(torch.rand(3), expected)


def test_accumulating_two_equals_a_batch_of_two(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe = tiny_sd()
    together = train(pipe, spec(steps=3, batch_size=2))
    accumulated = train(pipe, spec(steps=3, batch_size=1, gradient_accumulation=2))
    assert same(together, accumulated, tolerance=1e-5)  # AdamW divides by small moments
    assert not same(together, train(pipe, spec(steps=3, batch_size=1)), tolerance=1e-5)


def test_gradient_checkpointing_changes_no_result(
    tiny_sd: Callable[[], Any], spec: Spec, monkeypatch: Any
) -> None:
    pipe, calls = tiny_sd(), []
    plain = train(pipe, spec(train_text_encoder=True))
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    with given_back(pipe):
        assert same(
            plain, train(pipe, spec(train_text_encoder=True, gradient_checkpointing=True)), tolerance=1e-6
        )
    assert calls


@pytest.mark.parametrize(
    "values",
    [{}, {"targets": "all", "train_text_encoder": True}, {"precision": "bf16"}],
    ids=["plain", "all-and-text-encoder", "bf16"],
)
def test_the_base_comes_back_bit_for_bit(
    tiny_sd: Callable[[], Any], spec: Spec, values: dict[str, Any]
) -> None:
    pipe = tiny_sd()
    with given_back(pipe):
        train(pipe, spec(steps=1, **values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_trains_on_the_cpu_and_comes_back(
    tiny_sd: Callable[[], Any], spec: Spec, dtype: torch.dtype
) -> None:
    pipe = tiny_sd().to(dtype)
    with given_back(pipe):
        adapter = train(pipe, spec())
    assert all(torch.isfinite(up).all() and up.dtype == torch.float32 for _, up in factors(adapter).values())


def test_the_base_comes_back_after_an_exception(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe = tiny_sd().to(torch.float16)

    def fail(event: Event) -> None:
        if event.kind == "progress":
            raise RuntimeError("from outside")

    with given_back(pipe), pytest.raises(RuntimeError, match="from outside"):
        train(pipe, spec(targets="all", train_text_encoder=True, gradient_checkpointing=True), on_event=fail)


def test_a_stop_returns_what_is_trained_so_far(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, events = tiny_sd(), []
    done = lambda: sum(event.kind == "progress" for event in events) == 2  # noqa: E731
    with given_back(pipe):
        adapter = train(pipe, spec(steps=50, schedule="constant"), on_event=events.append, stop=done)
    assert adapter.metadata["ss_steps"] == "2" and adapter.metadata["ss_max_train_steps"] == "50"
    said = [event.message for event in events if event.kind == "message"]
    assert said[-1] == "Stopped after 2 of 50 steps; to go on: resume (--resume)."
    assert same(adapter, train(pipe, spec(steps=2, schedule="constant", overwrite=True)))


def test_samples_are_drawn_on_the_plain_base_with_the_adapter_so_far(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    pipe, events, calls = tiny_sd(), [], []
    names = [name for name, _ in pipe.unet.named_modules()]

    def draw(
        given: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
    ) -> list[Image.Image]:
        assert [name for name, _ in given.unet.named_modules()] == names and not given.unet.training
        (drawn,), (path,) = specs, paths
        calls.append((adapter and adapter.metadata["ss_steps"], drawn.prompt, drawn.seed, path))
        return [Image.new("RGB", (8, 8))]

    run = {"steps": 3, "sample_every": 2, "seed": 4}
    prompts = ("one", "two --d 7")
    adapter = train(pipe, spec(**run, sample_prompts=prompts), on_event=events.append, sample=draw)
    seeds = {"one": 4, "two": 7}
    assert [call[:3] for call in calls] == [
        (step, *one) for step in (None, "2", "3") for one in seeds.items()
    ]
    paths = [event.path for event in events if event.kind == "sample"]
    assert [path.name for path in paths] == [f"00000{step}-{n}.png" for step in (0, 2, 3) for n in (0, 1)]
    assert paths == [call[3] for call in calls]
    assert all(path.parent == tmp_path / "out" / "dog-run" / "samples" for path in paths)
    plain = train(pipe, spec(steps=3, seed=4, overwrite=True))
    assert same(adapter, plain), "drawing samples must not change training"
    with pytest.raises(TrainingError, match="sample_every is set but there is nothing to draw"):
        train(pipe, spec(**run, overwrite=True))


def test_a_run_goes_on_without_samples_where_the_memory_is_not_enough_for_them(
    tiny_sd: Callable[[], Any], spec: Spec
) -> None:
    events: list[Event] = []
    tried: list[bool] = []

    def draw(*_: Any) -> list[Image.Image]:
        tried.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    adapter = train(tiny_sd(), spec(steps=2, sample_every=1), on_event=events.append, sample=draw)
    assert adapter.metadata["ss_steps"] == "2" and tried == [True]
    said = [event.message for event in events if "Warning" in event.message]
    assert said == [
        "Warning: no samples are drawn from here on, as the GPU's memory is not enough: 2.00 GiB more were "
        "asked for."
    ]


def test_divergence_stops_with_what_to_lower_and_saves_the_last_good_adapter(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.trainers.step import TrainStep

    pipe, calls, forward = tiny_sd(), [], TrainStep.forward

    def break_down(self: TrainStep, batch: Any) -> Tensor:
        # The passes before the first step are over empty pictures.
        calls.extend([1] * bool(batch.noise.any()))
        return forward(self, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(TrainStep, "forward", break_down)
    (tmp_path / "out").mkdir()
    words = r"the loss is no longer finite at step 3\. Lower .* \(now 0\.001, try 0\.0001\).*step 1 is saved"
    with given_back(pipe), pytest.raises(TrainingError, match=words):
        train(pipe, spec(steps=5, overwrite=True))
    folder = tmp_path / "out" / "dog-run" / "adapters"
    rescued = load_adapter(folder / "dog-last-good-000001.safetensors", base=pipe)
    assert rescued.metadata["ss_steps"] == "1"
    monkeypatch.setattr(TrainStep, "forward", forward)
    good = train(pipe, spec(steps=5, overwrite=True), stop=iter([False, True]).__next__)
    for name in factors(good):
        assert torch.allclose(
            rescued.changes[name].delta(torch.empty(rescued.changes[name].shape), weight=1.0),
            good.changes[name].delta(torch.empty(good.changes[name].shape), weight=1.0),
            atol=1e-5,
        )  # fp16 file
    assert any(up.any() for _, up in factors(good).values())


def test_a_first_step_that_breaks_down_has_nothing_to_save(
    tiny_sd: Callable[[], Any], spec: Spec, tmp_path: Path
) -> None:
    pipe = tiny_sd()
    pipe.unet.conv_in.weight.data[0] = float("nan")
    with pytest.raises(TrainingError, match=r"at step 1\..*Nothing was trained before it"):
        train(pipe, spec())
    assert sorted(path.name for path in (tmp_path / "out" / "dog-run").iterdir()) == [
        ".lock",
        "log.jsonl",
        "spec.toml",
    ]


def test_sdxl_trains_with_both_text_encoders(tiny_sdxl: Callable[[], Any], spec: Spec) -> None:
    pipe = tiny_sdxl()
    with given_back(pipe):
        adapter = train(pipe, spec(steps=2, train_text_encoder=True, caption_dropout=0.5))
    moved = {name.split(".")[0] for name, (_, up) in factors(adapter).items() if up.abs().max() > 0}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    assert adapter.metadata["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 5e-4},
        {"schedule": "linear"},
        {"schedule": "constant"},
        {"warmup_steps": 2},
        {"weight_decay": 1.0},
        {"max_grad_norm": 1e-3},
        {"min_snr_gamma": None},
        {"min_snr_gamma": 1.0},
        {"min_snr_gamma": None, "debiased": True},
        {"loss": "l1"},
        {"loss": "huber"},
        {"noise_offset": 0.1},
        {"min_timestep": 900},
        {"max_timestep": 100},
        {"clip_skip": 2},
        {"schedule": "polynomial"},
        {"schedule": "restarts"},
        {"ema_decay": 0.5},
        {"checkpoint_every": 1, "average_last": 2},
        {"optimizer_options": {"betas": "0.5, 0.9"}},
        {"optimizer": "adafactor"},
        {"optimizer": "lion"},
        {"optimizer": "prodigy"},
        {"caption_dropout": 1.0},
        {"max_token_length": 3},
        {"flip": True},
        {"center_crop": False},
        {"resolution": 48},
        {"prompt": "a cat"},
        {"precision": "bf16"},
        {"steps": 4},
        {"dropout": 0.5},
        {"alpha": 1.0},
    ],
    ids=str,
)
def test_each_field_changes_the_result(
    shared: Any, spec: Spec, folder: Path, values: dict[str, Any], plain: dict[str, Adapter]
) -> None:
    # Pictures that differ when mirrored or cropped elsewhere.
    for index in range(4):
        picture = Image.linear_gradient("L").resize((90, 64)).rotate(45 + 90 * index).convert("RGB")
        picture.save(folder / f"{index}.png")
    given = {"steps": 3, "seed": SEED}
    if not plain:
        plain["adapter"] = train(shared, spec(**given, overwrite=True))
    assert not same(plain["adapter"], train(shared, spec(**given | values, overwrite=True)))


@pytest.fixture(scope="module")
def shared(tiny_sd: Callable[[], Any]) -> Any:
    """Return one base for many runs: each gives it back as it was."""
    return tiny_sd()


@pytest.fixture(scope="module")
def plain() -> dict[str, Adapter]:
    """Return a place for the adapter that all variations are compared with."""
    return {}


def test_the_text_encoders_rate_is_its_own(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe, values = tiny_sd(), {"steps": 1, "train_text_encoder": True}
    half, same_rate = (
        train(pipe, spec(**values)),
        train(pipe, spec(**values, text_encoder_learning_rate=1e-3)),
    )
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
    slow, fast = (float(factors(adapter)[name][1].abs().max()) for adapter in (half, same_rate))
    assert fast == pytest.approx(2 * slow, rel=1e-3)  # Adam's eps


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"precision": "fp16"}, TrainingError, "fp16 cannot train on 'cpu'.*fp32, bf16 or auto"),
        ({"device": "cuda:7"}, UsageError, "cuda:7"),
        (
            {"sample_prompts": ("a --x 1", "b --w 9", "<lora:c:1>")},
            UsageError,
            r"(?s)'a --x 1': '--x' in a prompt is not known.*'b --w 9': width: .*1>': samples show the",
        ),
    ],
    ids=["fp16-on-cpu", "no-such-gpu", "sample-prompts"],
)
def test_requests_that_do_not_fit_are_refused_before_any_work(
    tiny_sd: Callable[[], Any], spec: Spec, values: dict[str, Any], error: type[Exception], words: str
) -> None:
    pipe = tiny_sd()
    with given_back(pipe), pytest.raises(error, match=words):
        train(pipe, spec(**values))


def test_offloaded_and_inpainting_bases_are_refused(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    pipe = tiny_sd()
    pipe.unet._hf_hook = object()
    with pytest.raises(TrainingError, match=r"unet is offloaded.*remove_all_hooks"):
        train(pipe, spec())
    pipe = tiny_sd()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(TrainingError, match="takes 9 channels, its autoencoder gives 4; inpainting"):
        train(pipe, spec())
