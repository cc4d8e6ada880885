from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.data.batches import Samples
from studio.data.buckets import Buckets
from studio.data.cache import MemoryCache
from studio.data.folder import read_pictures
from studio.data.picture import PLAIN, Treatment
from studio.errors import SpecError, TrainingError
from studio.specs import TrainSpec, parse_spec
from studio.trainers.losses import Loss
from studio.trainers.prompts import Prompts
from studio.trainers.runtime import rate_factor
from studio.trainers.step import Batch, Latents, NoiseSchedule, TrainStep

CPU = torch.device("cpu")


def with_prediction(pipe: Any, prediction_type: str, **config: Any) -> Any:
    pipe.scheduler.register_to_config(prediction_type=prediction_type, **config)
    return pipe


def cumulative(timesteps: list[int]) -> torch.Tensor:
    """Return the products of alpha of the tiny base's schedule, from its definition in fp64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)[timesteps]


def batch(size: int = 3, *, side: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn((size, 4, side, side), generator=generator) for _ in range(2))
    timesteps = torch.tensor([1, 300, 990][:size])
    captions, sizes = ("dog", "cat", "dog")[:size], torch.tensor([[64, 80, 0, 8, 64, 64]] * size)
    return Batch(latents, noise, timesteps, captions, sizes, torch.full((size,), 1 / size))


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_the_formula(
    tiny_sd: Callable[[], Any], prediction_type: str, gamma: float
) -> None:
    timesteps = list(range(0, 1000, 37))
    kept = cumulative(timesteps)
    snr = kept / (1 - kept)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    wanted = torch.minimum(snr, torch.full_like(snr, gamma)) / divisor
    weights = NoiseSchedule(with_prediction(tiny_sd(), prediction_type)).loss_weights(
        Loss(min_snr_gamma=gamma)
    )
    assert weights is not None
    assert torch.allclose(weights[timesteps].double(), wanted, rtol=1e-4)  # fp32 products of the scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_debiased_weights_are_those_of_the_noises_error(
    tiny_sd: Callable[[], Any], prediction_type: str
) -> None:
    timesteps = list(range(0, 1000, 37))
    kept = cumulative(timesteps)
    # The error of the noise is sqrt(kept) times that of the velocity.
    wanted = ((1 - kept) / kept).sqrt() * (1.0 if prediction_type == "epsilon" else kept)
    weights = NoiseSchedule(with_prediction(tiny_sd(), prediction_type)).loss_weights(Loss(debiased=True))
    assert weights is not None
    assert torch.allclose(weights[timesteps].double(), wanted, rtol=1e-4)  # the same


def test_debiased_weights_of_pure_noise_are_refused_where_they_are_infinite(
    tiny_sd: Callable[[], Any],
) -> None:
    pipe = with_prediction(tiny_sd(), "v_prediction", rescale_betas_zero_snr=True)
    weights = NoiseSchedule(pipe).loss_weights(Loss(debiased=True))
    assert weights is not None and float(weights[999]) == pytest.approx(0.0, abs=1e-6)
    pipe = with_prediction(tiny_sd(), "epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(TrainingError, match=r"ends in pure noise.*Set debiased to off"):
        NoiseSchedule(pipe).loss_weights(Loss(debiased=True))


def test_errors_are_squared_absolute_or_hubers() -> None:
    predicted = torch.linspace(-2, 2, 41)
    target = torch.full((41,), 0.3)
    size = (predicted.double() - target.double()).abs()
    huber = torch.where(size < 0.5, size**2, size - 0.25)
    for loss, wanted in (
        (Loss(), size**2),
        (Loss("l1"), size),
        (Loss("huber", 0.5), huber),
        (Loss("huber"), torch.where(size < 0.1, size**2, 0.2 * size - 0.01)),
    ):
        assert torch.allclose(loss.errors(predicted, target).double(), wanted, atol=1e-6)  # fp32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"debiased": True}, "debiased: min_snr_gamma weights the loss already"),
        ({"huber_delta": 0.2}, "huber_delta: counts only where loss is 'huber', got 'l2'"),
        ({"schedule_power": 1.0}, "schedule_power: counts only where schedule is 'polynomial', got 'cosine'"),
        ({"schedule_restarts": 2}, "schedule_restarts: counts only where schedule is 'restarts'"),
        ({"average_last": 2}, "average_last: needs checkpoints on the way"),
        ({"average_last": 3, "checkpoint_every": 1}, r"must be at most keep_checkpoints \(2\), got 3"),
        (
            {"average_last": 2, "checkpoint_every": 1, "ema_decay": 0.9},
            "average_last: ema_decay averages already",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_spec(TrainSpec, {"data": "d", "output": "x.safetensors", **values})


@pytest.mark.parametrize(("prediction_type", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_where_only_noise_is_left(
    tiny_sd: Callable[[], Any], prediction_type: str, weight: float
) -> None:
    pipe = with_prediction(tiny_sd(), prediction_type, rescale_betas_zero_snr=True)
    weights = NoiseSchedule(pipe).loss_weights(Loss(min_snr_gamma=5.0))
    assert weights is not None and float(weights[999]) == pytest.approx(weight, abs=1e-6)


def test_noisy_latents_and_both_targets_equal_their_formulas(tiny_sd: Callable[[], Any]) -> None:
    given, pipe = batch(), tiny_sd()
    kept = cumulative([1, 300, 990]).view(3, 1, 1, 1)
    latents, noise = given.latents.double(), given.noise.double()
    schedule = NoiseSchedule(pipe)
    noisy = schedule.noisy(given.latents, given.noise, given.timesteps)
    assert torch.allclose(
        noisy.double(), kept.sqrt() * latents + (1 - kept).sqrt() * noise, atol=1e-5
    )  # fp32 products
    assert torch.equal(schedule.target(given.latents, given.noise, given.timesteps), given.noise)
    velocity = NoiseSchedule(with_prediction(pipe, "v_prediction")).target(
        given.latents, given.noise, given.timesteps
    )
    assert torch.allclose(
        velocity.double(), kept.sqrt() * noise - (1 - kept).sqrt() * latents, atol=1e-5
    )  # the same


def test_a_base_that_predicts_the_picture_is_refused(tiny_sd: Callable[[], Any]) -> None:
    with pytest.raises(TrainingError, match="the base predicts 'sample', wanted 'epsilon' or 'v_prediction'"):
        NoiseSchedule(with_prediction(tiny_sd(), "sample"))


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_mean_squared_error(
    tiny_sd: Callable[[], Any], prediction_type: str, gamma: float | None
) -> None:
    pipe, given = with_prediction(tiny_sd(), prediction_type), batch()
    step = TrainStep(pipe, loss=Loss(min_snr_gamma=gamma), prompts=Prompts(pipe, cache=MemoryCache()))
    with torch.no_grad():
        noisy = step.schedule.noisy(given.latents, given.noise, given.timesteps)
        states = pipe.encode_prompt(list(given.captions), CPU, 1, False)[0]
        predicted = pipe.unet(noisy, given.timesteps, states).sample
        target = step.schedule.target(given.latents, given.noise, given.timesteps)
        errors = (predicted - target).double().square().mean((1, 2, 3))
        every = step.schedule.loss_weights(Loss(min_snr_gamma=gamma))
        weights = torch.ones(3) if every is None else every[given.timesteps]
        assert float(step(given)) == pytest.approx(float((errors * weights).mean()), rel=1e-5)  # fp32 sums


def test_captions_are_encoded_once_unless_the_encoders_are_trained(tiny_sd: Callable[[], Any]) -> None:
    pipe, calls = tiny_sd(), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    cached = Prompts(pipe, cache=MemoryCache())
    first = cached(["dog", "cat", "dog"], CPU).embeddings
    again = cached(["dog", "cat", "dog"], CPU).embeddings
    assert len(calls) == 2 and torch.equal(first, again) and not torch.equal(first[0], first[1])
    live = Prompts(pipe, trained=True)(["dog", "cat", "dog"], CPU).embeddings
    assert len(calls) == 3 and torch.allclose(live, first, atol=1e-6)  # batched sums


@pytest.mark.parametrize("trained", [False, True])
def test_sdxl_prompts_are_those_of_generation_and_the_empty_one_is_zero(
    tiny_sdxl: Callable[[], Any], trained: bool
) -> None:
    pipe = tiny_sdxl()
    embeddings, pooled, mask = Prompts(pipe, trained=trained)(["dog", ""], CPU)
    wanted, empty, wanted_pooled, empty_pooled = pipe.encode_prompt(
        "dog", device=CPU, do_classifier_free_guidance=True
    )
    assert embeddings.shape == (2, 77, 64) and pooled is not None and pooled.shape == (2, 32)
    assert mask is None
    assert torch.allclose(embeddings, torch.cat([wanted, empty]), atol=1e-6)  # batched sums
    assert torch.allclose(pooled, torch.cat([wanted_pooled, empty_pooled]), atol=1e-6)  # the same
    assert not empty.any()


def test_sdxl_is_told_sizes_and_pooled_prompts(tiny_sdxl: Callable[[], Any]) -> None:
    pipe, given, seen = tiny_sdxl(), batch(2), {}
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    TrainStep(pipe, prompts=Prompts(pipe, cache=MemoryCache()))(given)
    assert seen["time_ids"].tolist() == [[64, 80, 0, 8, 64, 64]] * 2 and seen["text_embeds"].shape == (2, 32)


def samples_of(folder: Path, treatment: Treatment = PLAIN) -> Samples:
    pictures = read_pictures(folder, prompt="dog", treatment=treatment)
    return Samples(pictures, seed=0, buckets=Buckets.square(64), num_timesteps=1000)


@pytest.fixture
def latents(tiny_sd: Callable[[], Any], folder: Path) -> Callable[..., tuple[Latents, list[int]]]:
    """Return a function from a treatment to latents of the folder and the list that counts encodings."""

    def build(**values: Any) -> tuple[Latents, list[int]]:
        pipe, calls = tiny_sd(), []
        pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
        treatment = Treatment(**values)
        return Latents(pipe, samples_of(folder, treatment), device=CPU, cache=MemoryCache()), calls

    return build


def test_a_picture_is_encoded_once_where_its_crop_is_fixed(latents: Callable[..., Any]) -> None:
    source, calls = latents()
    for first in range(0, 16, 4):
        source.batch(first, 4)
    assert len(calls) == 2, "of four pictures two are copies"
    source, calls = latents(flip=True)
    for first in range(0, 40, 4):
        source.batch(first, 4)
    assert len(calls) == 4
    source, calls = latents(center_crop=False)
    source.batch(0, 8)
    assert len(calls) == 8


def test_a_batch_is_its_samples(latents: Callable[..., Any]) -> None:
    source, _ = latents(center_crop=False, flip=True)
    whole, parts = source.batch(2, 3), [source.batch(index, 1) for index in (2, 3, 4)]
    for field in ("latents", "noise", "timesteps", "size_conditions"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    assert whole.captions == tuple(part.captions[0] for part in parts)
    assert whole.latents.shape == whole.noise.shape == (3, 4, 8, 8)


def test_pictures_are_encoded_in_fp32_also_where_a_step_computes_in_mixed_precision(
    latents: Callable[..., Any],
) -> None:
    wanted = latents()[0].batch(0, 2).latents
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents()[0].batch(0, 2).latents, wanted)


def test_latents_follow_the_autoencoders_scale_and_deviation(
    tiny_sd: Callable[[], Any], folder: Path
) -> None:
    pipe = tiny_sd()
    samples = samples_of(folder)
    sample = samples[0]
    with torch.no_grad():
        distribution = pipe.vae.encode(samples.pixels(sample)[None]).latent_dist
    posterior, noise = samples.noise(sample, (4, 8, 8))
    drawn = distribution.mean[0] + distribution.std[0] * posterior
    found, found_noise = Latents(pipe, samples, device=CPU, cache=None)(sample)
    assert torch.allclose(found, drawn * pipe.vae.config.scaling_factor) and torch.equal(found_noise, noise)
    pipe.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    shifted, _ = Latents(pipe, samples, device=CPU, cache=None)(sample)
    assert torch.allclose(
        shifted, (drawn - 1.0) * pipe.vae.config.scaling_factor / 2.0, atol=1e-6
    )  # fp32 order


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
        ("polynomial", [0.5, 1, 1, 0.5625, 0.25, 0.0625]),
        ("restarts", [0.5, 1, 1, 0.146447, 0.5, 0.853553]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_named(schedule: str, factors: list[float]) -> None:
    run = TrainSpec.model_validate(
        {"data": "d", "output": "x.safetensors", "steps": 6, "warmup_steps": 2, "schedule": schedule}
    )
    assert [rate_factor(run, step) for step in range(6)] == pytest.approx(factors, abs=1e-6)
