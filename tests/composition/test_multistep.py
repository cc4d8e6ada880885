"""Multistep solvers at a change of adapters: what was answered before is combined, or it is not."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from studio.composition.engine import compose
from studio.composition.methods.switch import Switch
from studio.composition.methods.w_switch import WSwitchPlan
from studio.composition.modifiers.pin import Pin
from studio.composition.multistep import check_restarts
from studio.composition.plan import Step
from studio.errors import CompositionError
from studio.models.schedulers import make_scheduler

STEPS, PERIOD = 7, 3
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa": ("SASolverScheduler", {"tau_func": lambda t: 0}),
}


@pytest.fixture(scope="module")
def sd(short_sd: Any) -> Any:
    return short_sd()


@pytest.fixture
def pair(sd: Any, make_adapter: Any, target: Any) -> dict[str, Any]:
    names = ("unet.mid_block.resnets.0.conv1.weight",)
    return {"one": make_adapter(sd, 1, targets=names), "two": make_adapter(sd, 2, targets=names)}


@pytest.fixture
def switched(sd: Any, pair: Any, draw: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """Return a function that draws with Switch and a solver, whose history is kept or dropped."""

    def run(scheduler: Any, history: str) -> torch.Tensor:
        monkeypatch.setattr(sd, "scheduler", scheduler)
        options = {"switch_every": PERIOD, "solver_history": history}
        with compose(sd, pair, method="switch", options=options):
            latents: torch.Tensor = draw(sd, steps=STEPS, guidance_scale=1.0)
        return latents

    return run


def start_and_prompt(pipe: Any, scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents that a run starts from and what the prompt is encoded to."""
    size = pipe.unet.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    return noise * scheduler.init_noise_sigma, pipe.encode_prompt("a fox", torch.device("cpu"), 1, False)[0]


@torch.no_grad()
def turn_by_turn(pipe: Any, pair: Any, solver: Callable[[], Any]) -> torch.Tensor:
    """Draw in turns, with a scheduler for each that has seen nothing of the turns before."""
    latents, prompt = start_and_prompt(pipe, solver())
    for begin in range(0, STEPS, PERIOD):
        scheduler = solver()
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(begin)
        name = "one" if begin // PERIOD % 2 == 0 else "two"
        with compose(pipe, {name: pair[name]}):
            for timestep in scheduler.timesteps[begin : begin + PERIOD]:
                answer = pipe.unet(latents, timestep, encoder_hidden_states=prompt).sample
                latents = scheduler.step(answer, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("name", SOLVERS)
def test_a_dropped_history_is_that_of_a_fresh_solver_for_each_turn(
    name: str, sd: Any, pair: Any, switched: Any
) -> None:
    kind, options = SOLVERS[name]
    config = sd.scheduler.config

    def solver() -> Any:
        return getattr(diffusers, kind).from_config(config, **options)

    dropped = switched(solver(), "drop")
    assert torch.equal(dropped, turn_by_turn(sd, pair, solver))
    assert float((dropped - switched(solver(), "keep")).abs().max()) > 1e-4


@torch.no_grad()
def test_plms_takes_up_its_formula_anew_with_each_turn(sd: Any, pair: Any, switched: Any) -> None:
    solver = make_scheduler(sd, "pndm")
    got = switched(solver, "drop")
    latents, prompt = start_and_prompt(sd, solver)
    alphas = torch.cat([solver.final_alpha_cumprod.view(1), solver.alphas_cumprod]).double()

    def moved(latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        a, b = alphas[timestep + 1], alphas[max(timestep - 1000 // STEPS, -1) + 1]
        clean = (latents - (1 - a).sqrt() * noise) / a.sqrt()
        return b.sqrt() * clean + (1 - b).sqrt() * noise

    # Adams-Bashforth, newest first.
    formulas = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12])
    timesteps = solver.timesteps.tolist()
    del timesteps[1:2]
    state, said = latents.double(), []
    for index, timestep in enumerate(timesteps):
        name = "one" if index // PERIOD % 2 == 0 else "two"
        with compose(sd, {name: pair[name]}):

            def ask(latents: torch.Tensor, timestep: int) -> torch.Tensor:
                answer = sd.unet(latents.float(), timestep, encoder_hidden_states=prompt).sample
                return answer.double()

            said = [] if index % PERIOD == 0 else said
            said.insert(0, ask(state, timestep))
            noise = sum(factor * one for factor, one in zip(formulas[len(said) - 1], said, strict=True))
            if index == 0:
                # The first step is done twice: with the mean of the answers at both of its ends.
                noise = (said[0] + ask(moved(state, noise, timestep), timesteps[1])) / 2
        state = moved(state, noise, timestep)
    torch.testing.assert_close(got.double(), state, rtol=1e-3, atol=1e-3)  # fp32 answers, seven steps
    assert float((switched(solver, "keep") - got).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["ddim", "euler", "heun"])
def test_a_solver_without_a_history_has_none_to_drop(name: str, sd: Any, switched: Any) -> None:
    pictures = [switched(make_scheduler(sd, name), history) for history in ("keep", "drop")]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("DPMSolverSinglestepScheduler", {}), ("PNDMScheduler", {"skip_prk_steps": False})],
    ids=["singlestep", "runge-kutta"],
)
def test_a_solver_that_cannot_start_anew_is_refused_before_the_first_step(
    kind: str, options: dict[str, Any], sd: Any, switched: Any
) -> None:
    scheduler = getattr(diffusers, kind).from_config(sd.scheduler.config, **options)
    calls: list[Any] = []
    handle = sd.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(CompositionError, match=f"{kind} cannot start anew.*Choose another solver"):
        switched(scheduler, "drop")
    handle.remove()
    assert not calls
    with pytest.raises(CompositionError, match="IPNDMScheduler cannot start anew"):
        check_restarts(diffusers.IPNDMScheduler())


def test_the_solver_starts_anew_where_the_adapter_changes() -> None:
    names = {"a": None, "b": None, "c": None}
    weights = dict.fromkeys(names, 1.0)
    steps = [Step(index, 9, index / 9) for index in range(9)]
    drop = Switch.Options(switch_every=2, solver_history="drop")
    plan = Switch(drop).prepare(names, weights)
    assert [step.index for step in steps if plan.restarts(step)] == [2, 4, 6, 8]
    pinned = Pin(Pin.Options(adapters=("p",))).modify(plan, {**names, "p": None}, {**weights, "p": 1.0})
    assert [step.index for step in steps if pinned.restarts(step)] == [2, 4, 6, 8]
    assert not any(Switch().prepare(names, weights).restarts(step) for step in steps)
    alone = Switch(drop).prepare({"a": None}, {"a": 1.0})
    assert not any(alone.restarts(step) for step in steps)
    weighed = WSwitchPlan(
        ("a", "b"), weights, "drop", turns=(1, 3), final="b", final_steps=2, text_weights={}
    )
    assert [step.index for step in steps if weighed.restarts(step)] == [1, 4, 5]
