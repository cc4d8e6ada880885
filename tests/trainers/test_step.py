from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.data.batches import Samples
from studio.data.folder import read_pictures
from studio.errors import TrainingError
from studio.specs import TrainSpec
from studio.trainers.runtime import rate_factor
from studio.trainers.step import Batch, Latents, NoiseSchedule, Prompts, TrainStep

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
    return Batch(
        latents, noise, timesteps, ("dog", "cat", "dog")[:size], torch.tensor([[64, 80, 0, 8, 64, 64]] * size)
    )


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
    weights = NoiseSchedule(with_prediction(tiny_sd(), prediction_type)).min_snr_weights(
        torch.tensor(timesteps), gamma
    )
    assert torch.allclose(weights.double(), wanted, rtol=1e-4)  # the scheduler's products are fp32


@pytest.mark.parametrize(("prediction_type", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_where_only_noise_is_left(
    tiny_sd: Callable[[], Any], prediction_type: str, weight: float
) -> None:
    pipe = with_prediction(tiny_sd(), prediction_type, rescale_betas_zero_snr=True)
    assert NoiseSchedule(pipe).min_snr_weights(torch.tensor([999]), 5.0).tolist() == pytest.approx(
        [weight], abs=1e-6
    )


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
    step = TrainStep(pipe, min_snr_gamma=gamma, train_text_encoders=False)
    with torch.no_grad():
        noisy = step.schedule.noisy(given.latents, given.noise, given.timesteps)
        states = pipe.encode_prompt(list(given.captions), CPU, 1, False)[0]
        predicted = pipe.unet(noisy, given.timesteps, states).sample
        target = step.schedule.target(given.latents, given.noise, given.timesteps)
        errors = (predicted - target).double().square().mean((1, 2, 3))
        weights = step.schedule.min_snr_weights(given.timesteps, gamma) if gamma else torch.ones(3)
        assert float(step(given)) == pytest.approx(float((errors * weights).mean()), rel=1e-5)  # fp32 sums


def test_captions_are_encoded_once_unless_the_encoders_are_trained(tiny_sd: Callable[[], Any]) -> None:
    pipe, calls = tiny_sd(), []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    cached = Prompts(pipe, cache=True)
    first, _ = cached(["dog", "cat", "dog"], CPU)
    again, _ = cached(["dog", "cat", "dog"], CPU)
    assert len(calls) == 2 and torch.equal(first, again) and not torch.equal(first[0], first[1])
    live, _ = Prompts(pipe, cache=False)(["dog", "cat", "dog"], CPU)
    assert len(calls) == 3 and torch.allclose(live, first, atol=1e-6)  # batched sums


@pytest.mark.parametrize("cache", [True, False])
def test_sdxl_prompts_are_those_of_generation_and_the_empty_one_is_zero(
    tiny_sdxl: Callable[[], Any], cache: bool
) -> None:
    pipe = tiny_sdxl()
    embeddings, pooled = Prompts(pipe, cache=cache)(["dog", ""], CPU)
    wanted, empty, wanted_pooled, empty_pooled = pipe.encode_prompt(
        "dog", device=CPU, do_classifier_free_guidance=True
    )
    assert embeddings.shape == (2, 77, 64) and pooled is not None and pooled.shape == (2, 32)
    assert torch.allclose(embeddings, torch.cat([wanted, empty]), atol=1e-6)  # batched sums
    assert torch.allclose(pooled, torch.cat([wanted_pooled, empty_pooled]), atol=1e-6)  # the same
    assert not empty.any()


def test_sdxl_is_told_sizes_and_pooled_prompts(tiny_sdxl: Callable[[], Any]) -> None:
    pipe, given, seen = tiny_sdxl(), batch(2), {}
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    TrainStep(pipe, min_snr_gamma=None, train_text_encoders=False)(given)
    assert seen["time_ids"].tolist() == [[64, 80, 0, 8, 64, 64]] * 2 and seen["text_embeds"].shape == (2, 32)


@pytest.fixture
def latents(tiny_sd: Callable[[], Any], folder: Path) -> Callable[..., tuple[Latents, list[int]]]:
    """Return a function from spec fields to latents of the folder and the list that counts encodings."""

    def build(**values: Any) -> tuple[Latents, list[int]]:
        pipe, calls = tiny_sd(), []
        pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
        run = TrainSpec.model_validate({"data": folder, "output": "x.safetensors"} | values)
        samples = Samples(read_pictures(folder, prompt="dog"), run, resolution=64, num_timesteps=1000)
        return Latents(pipe, samples, device=CPU), calls

    return build


def test_a_picture_is_encoded_once_where_its_crop_is_fixed(latents: Callable[..., Any]) -> None:
    source, calls = latents()
    for first in range(0, 16, 4):
        source.batch(first, 4)
    assert len(calls) == 4
    source, calls = latents(flip=True)
    for first in range(0, 40, 4):
        source.batch(first, 4)
    assert len(calls) == 8
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


def test_latents_follow_the_autoencoders_scale_and_deviation(
    tiny_sd: Callable[[], Any], folder: Path
) -> None:
    pipe = tiny_sd()
    run = TrainSpec.model_validate({"data": folder, "output": "x.safetensors"})
    samples = Samples(read_pictures(folder, prompt="dog"), run, resolution=64, num_timesteps=1000)
    sample = samples[0]
    with torch.no_grad():
        distribution = pipe.vae.encode(samples.pixels(sample)[None]).latent_dist
    posterior, noise = samples.noise(sample, (4, 8, 8))
    drawn = distribution.mean[0] + distribution.std[0] * posterior
    found, found_noise = Latents(pipe, samples, device=CPU)(sample)
    assert torch.allclose(found, drawn * pipe.vae.config.scaling_factor) and torch.equal(found_noise, noise)
    pipe.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    shifted, _ = Latents(pipe, samples, device=CPU)(sample)
    assert torch.allclose(
        shifted, (drawn - 1.0) * pipe.vae.config.scaling_factor / 2.0, atol=1e-6
    )  # fp32 order


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_named(schedule: str, factors: list[float]) -> None:
    run = TrainSpec.model_validate(
        {"data": "d", "output": "x.safetensors", "steps": 6, "warmup_steps": 2, "schedule": schedule}
    )
    assert [rate_factor(run, step) for step in range(6)] == pytest.approx(factors, abs=1e-6)
