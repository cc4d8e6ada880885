"""Where we are in a run: follow a scheduler's ``set_timesteps`` and ``step`` without changing what they do.

The value of a timestep does not tell the step: Heun calls the denoiser twice a step, PNDM repeats one call,
DPM++ with Karras sigmas may repeat values, image-to-image starts inside the schedule, and reading a timestep
from a GPU waits for it. So calls are counted, and the starting place comes from where the timestep lies in
the scheduler's own table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from studio.composition.multistep import restarted
from studio.composition.plan import Step
from studio.models.shadow import shadowed


class Position:
    """Follows the runs of one scheduler.

    Args:
        scheduler: A diffusers scheduler.
        pipe: The pipeline that runs it, if any: some stop before the schedule's end and say so only there.
        started: Called when a run starts.
    """

    def __init__(self, scheduler: Any, pipe: Any = None, started: Callable[[], None] | None = None) -> None:
        self._scheduler = scheduler
        self._pipe = pipe
        self._started = started
        self._scheduled = False
        self._run: list[Step] | None = None
        self._calls = 0
        self._shift: Tensor | None = None
        self._restarts = False

    @contextmanager
    def follow(self) -> Iterator["Position"]:
        """Shadow the two methods on this scheduler object; leave no trace on exit."""
        scheduler = self._scheduler
        shadows = {
            "set_timesteps": _followed_by(scheduler.set_timesteps, self._after_set_timesteps),
            "step": _followed_by(self._prepared(scheduler.step), self._after_step),
        }
        try:
            with shadowed(scheduler, shadows):
                yield self
        finally:
            self._scheduled, self._run = False, None

    def run(self, timestep: Tensor | float) -> list[Step] | None:
        """Return the steps of the current run, one entry per denoiser call; None outside a run.

        Args:
            timestep: What the denoiser is called with; the first call of a run tells where the run starts.
        """
        if self._run is None and self._scheduled:
            self._run = self._lay_out(self._begin(timestep))
        return self._run

    def step(self, timestep: Tensor | float) -> Step | None:
        """Return the step that this denoiser call belongs to; None outside a run."""
        run = self.run(timestep)
        return run[self._calls] if run is not None and self._calls < len(run) else None

    def shift(self, shift: Tensor) -> None:
        """Have the scheduler's next step start from latents moved by this much.

        Args:
            shift: ``[B, C, h, w]``, in the scale in which the denoiser is given latents.
        """
        self._shift = shift

    def restart(self) -> None:
        """Have the scheduler's next step combine nothing that was answered before."""
        self._restarts = True

    def _prepared(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def prepared(answer: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            shift, self._shift = self._shift, None
            if shift is not None:
                # What the denoiser is given is what the scheduler holds times a number of the step.
                scale = self._scheduler.scale_model_input(sample.new_ones(1), timestep)
                sample = sample + (shift / scale).to(sample.dtype)
            restarts, self._restarts = self._restarts, False
            with restarted(self._scheduler) if restarts else nullcontext():
                return step(answer, timestep, sample, *args, **kwargs)

        return prepared

    def _after_set_timesteps(self) -> None:
        self._shift, self._restarts = None, False
        self._scheduled = True
        self._run = None
        self._calls = 0
        if hasattr(self._pipe, "_num_timesteps"):
            self._pipe._num_timesteps = None
        if self._started is not None:
            self._started()

    def _after_step(self) -> None:
        self._calls += 1

    def _begin(self, timestep: Tensor | float) -> int:
        """Return the place of the run's first call in the schedule."""
        table = self._scheduler.timesteps
        if isinstance(timestep, Tensor) and _shares_memory(timestep, table):
            offset = timestep.storage_offset() - table.storage_offset()
            return int(offset // max(table.stride(0), 1))
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        # Only for loops of the caller's own that copy timesteps: the one place that may wait for a GPU, once
        # a run.
        value = float(torch.as_tensor(timestep).flatten()[0])
        places = [float(each) for each in table.tolist()]
        return min(range(len(places)), key=lambda place: abs(places[place] - value))

    def _lay_out(self, begin: int) -> list[Step]:
        """Return one step per denoiser call from ``begin`` to the end of the run."""
        solver_step = _solver_steps(self._scheduler)
        whole = len(self._scheduler.timesteps)
        rest = whole - begin
        planned = getattr(self._pipe, "_num_timesteps", None)
        calls = min(rest, planned) if planned else rest
        full = solver_step(whole - 1) + 1
        skipped = full - (solver_step(rest - 1) + 1)
        total = solver_step(calls - 1) + 1
        return [Step(solver_step(call), total, (skipped + solver_step(call)) / full) for call in range(calls)]


def _followed_by(method: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    # wraps() keeps the signature, from which pipelines read what a scheduler accepts.
    @wraps(method)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        after()
        return result

    return followed


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _solver_steps(scheduler: Any) -> Callable[[int], int]:
    """Return the map from denoiser calls since the run's start to solver steps."""
    if hasattr(scheduler, "prk_timesteps"):
        runge_kutta = len(scheduler.prk_timesteps)
        if runge_kutta:
            return lambda call: call // 4 if call < runge_kutta else runge_kutta // 4 + call - runge_kutta
        # The second call of PLMS does the first step again, better.
        return lambda call: max(call - 1, 0)
    order = int(getattr(scheduler, "order", 1))
    return lambda call: call // order
