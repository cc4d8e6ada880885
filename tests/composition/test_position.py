"""Where we are in a run, for every kind of solver."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from studio.composition.plan import Step
from studio.composition.position import Position

SOLVERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm-runge-kutta": ("PNDMScheduler", {"skip_prk_steps": False}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm-single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(name: str) -> Any:
    kind, options = SOLVERS[name]
    return getattr(diffusers, kind)(**BETAS, **options)


def watched(pipe: Any, run: Callable[[Any], Any]) -> list[Step | None]:
    """Return the position at each denoiser call while ``run(pipe)`` goes on."""
    seen: list[Step | None] = []
    position = Position(pipe.scheduler, pipe)

    def look(unet: Any, args: Any, kwargs: Any) -> None:
        seen.append(position.step(args[1] if len(args) > 1 else kwargs["timestep"]))

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with position.follow():
            run(pipe)
    finally:
        handle.remove()
    return seen


def indices(steps: list[Step | None]) -> list[int]:
    return [step.index for step in steps if step is not None]


@pytest.mark.parametrize("name", SOLVERS)
def test_text_to_image_goes_through_all_steps_in_order(name: str, short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = scheduler(name)
    steps = watched(pipe, lambda pipe: draw(pipe, steps=5))
    assert None not in steps
    assert indices(steps) == sorted(indices(steps))
    assert sorted(set(indices(steps))) == list(range(5))
    assert {step.total for step in steps if step} == {5}
    assert [step.fraction for step in steps if step] == [index / 5 for index in indices(steps)]


# The first steps of Runge-Kutta PNDM need four calls each, which a start inside the schedule would cut.
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "pndm-runge-kutta"])
def test_image_to_image_counts_its_own_steps_and_starts_inside_the_schedule(
    name: str, short_sd: Any, draw: Any
) -> None:
    base = short_sd()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.scheduler = scheduler(name)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps = watched(pipe, lambda pipe: draw(pipe, steps=10, image=picture, strength=0.6))
    assert None not in steps
    assert sorted(set(indices(steps))) == list(range(6))
    assert {step.total for step in steps if step} == {6}
    assert steps[0] is not None and steps[0].fraction == pytest.approx(0.4)


def test_the_two_calls_of_a_heun_step_share_it(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = scheduler("heun")
    steps = watched(pipe, lambda pipe: draw(pipe, steps=4))
    assert indices(steps) == [0, 0, 1, 1, 2, 2, 3]


def test_the_second_call_of_pndm_does_the_first_step_again(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    pipe.scheduler = scheduler("pndm")
    assert indices(watched(pipe, lambda pipe: draw(pipe, steps=4))) == [0, 0, 1, 2, 3]


def test_a_second_run_starts_from_the_first_step(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()
    steps = watched(pipe, lambda pipe: [draw(pipe, steps=3), draw(pipe, steps=2)])
    assert indices(steps) == [0, 1, 2, 0, 1]
    assert [step.total for step in steps if step] == [3, 3, 3, 2, 2]


def test_a_run_after_an_aborted_one_starts_from_the_first_step(short_sd: Any, draw: Any) -> None:
    pipe = short_sd()

    def stop(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        raise KeyboardInterrupt

    def twice(pipe: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, steps=5, callback_on_step_end=stop)
        draw(pipe, steps=2)

    assert indices(watched(pipe, twice)) == [0, 0, 1]


def test_a_run_that_ends_before_the_schedule_counts_the_steps_it_executes(short_sdxl: Any, draw: Any) -> None:
    steps = watched(short_sdxl(), lambda pipe: draw(pipe, steps=10, denoising_end=0.5))
    assert indices(steps) == list(range(len(steps)))
    assert {step.total for step in steps if step} == {len(steps)}
    assert len(steps) < 10


def test_a_loop_that_copies_timesteps_is_found_by_value() -> None:
    solver = scheduler("ddim")
    position = Position(solver)
    with position.follow():
        solver.set_timesteps(10)
        start = solver.timesteps[4].clone()
        step = position.step(start)
    assert step is not None and (step.index, step.total, step.fraction) == (0, 6, 0.4)


def test_repeated_timesteps_are_told_apart_by_their_place() -> None:
    solver = scheduler("ddim")
    position = Position(solver)
    with position.follow():
        solver.set_timesteps(6)
        solver.timesteps = torch.tensor([900, 700, 700, 700, 300, 100])
        position._after_set_timesteps()
        step = position.step(solver.timesteps[3:].unbind(0)[0])
    assert step is not None and step.fraction == 0.5


def test_following_leaves_no_trace_and_keeps_signatures() -> None:
    import inspect

    solver = scheduler("ddim")
    before = dict(vars(solver))
    signature = inspect.signature(solver.step)
    with pytest.raises(RuntimeError, match="stop"), Position(solver).follow():
        assert inspect.signature(solver.step) == signature
        assert "step" in vars(solver)
        raise RuntimeError("stop")
    assert vars(solver) == before


def test_outside_of_a_run_there_is_no_step() -> None:
    solver = scheduler("ddim")
    position = Position(solver)
    with position.follow():
        assert position.step(3) is None
        solver.set_timesteps(2)
        for timestep in solver.timesteps:
            assert position.step(timestep) is not None
            solver.step(torch.zeros(1, 4, 2, 2), timestep, torch.zeros(1, 4, 2, 2))
        assert position.step(1) is None
