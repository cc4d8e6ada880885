"""Solvers by name keep what belongs to the model."""

from typing import Any, get_args

import diffusers
import pytest
import torch

from studio.errors import BaseModelError, UsageError
from studio.models.schedulers import make_scheduler
from studio.specs import GenerateSpec

NAMES = get_args(GenerateSpec.model_fields["scheduler"].annotation)
OWN = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "base",
    [
        diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        diffusers.DDIMScheduler(),
    ],
    ids=["sd1", "v", "defaults"],
)
def test_the_noise_schedule_and_the_prediction_are_the_models(name: str, base: Any, short_sd: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = base
    made = make_scheduler(pipe, name)
    assert made is not base and pipe.scheduler is base
    assert {key: made.config[key] for key in OWN} == {key: base.config[key] for key in OWN}
    assert torch.allclose(made.alphas_cumprod, base.alphas_cumprod)


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_draws(name: str, short_sd: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = make_scheduler(pipe, name)
    latents = pipe("a fox", num_inference_steps=3, output_type="latent").images
    assert torch.isfinite(latents).all()


def exact_prediction(
    scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor, spread: float
) -> torch.Tensor:
    """Return what a perfect denoiser says of normally distributed data with that standard deviation."""
    alpha = scheduler.alphas_cumprod[int(timestep)].double()
    noise = sample * (1 - alpha).sqrt() / (alpha * spread**2 + 1 - alpha)
    if scheduler.config.prediction_type == "epsilon":
        return noise
    clean = sample * alpha.sqrt() * spread**2 / (alpha * spread**2 + 1 - alpha)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "euler-ancestral"])
def test_solvers_carry_noise_to_data_with_a_perfect_denoiser(
    name: str, prediction: str, short_sd: Any
) -> None:
    spread = 3.0  # wider than 1, so that clipping would show
    pipe = short_sd()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    scheduler = make_scheduler(pipe, name)
    scheduler.set_timesteps(50)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    sample = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(
            exact_prediction(scheduler, seen, timestep, spread), timestep, sample
        ).prev_sample
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[0].int()].double()
    # The ordinary differential equation keeps each value's quantile, arXiv:2011.13456 Sec. 4.3.
    exact = start * spread / (alpha * spread**2 + 1 - alpha).sqrt()
    # Solvers of first order leave 2 % after 50 steps and the start of unit variance another 1 %; clipping
    # leaves 60 %.
    assert float((sample - exact).norm() / exact.norm()) < 0.05


def test_solvers_for_pictures_do_not_clip_latents(short_sd: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    made = make_scheduler(pipe, "ddim")
    assert made.config.clip_sample is False and made.config.set_alpha_to_one is False
    assert make_scheduler(pipe, "pndm").config.skip_prk_steps is True
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    assert make_scheduler(pipe, "ddim").config.clip_sample is True


def test_dpm_is_the_second_order_multistep_solver_whatever_the_base_says(short_sd: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    config = make_scheduler(pipe, "dpm++2m").config
    assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)


def test_a_solver_that_cannot_run_zero_terminal_signal_is_refused(short_sd: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert make_scheduler(pipe, "euler").config.rescale_betas_zero_snr is True
    with pytest.raises(
        BaseModelError, match="scheduler 'heun' cannot run a base model with zero terminal signal"
    ):
        make_scheduler(pipe, "heun")


def test_an_unknown_solver_is_refused_with_the_nearest(short_sd: Any) -> None:
    with pytest.raises(UsageError, match=r"scheduler: unknown 'dmp\+\+2m'. Did you mean 'dpm\+\+2m'"):
        make_scheduler(short_sd(), "dmp++2m")
