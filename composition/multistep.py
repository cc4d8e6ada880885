"""Multistep solvers in mid-run: have a step combine nothing that the denoiser answered before.

DPM-Solver++ 2M, UniPC, DEIS, PLMS and their like extrapolate from the last answers, and UniPC also corrects
the step before. Where other weights take over, these answers are of another model. A solver that starts anew
takes a step of first order, as it does at the start of a run, and builds its history up again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from studio.errors import CompositionError


def check_restarts(scheduler: Any) -> None:
    """Raise CompositionError if a scheduler cannot start anew in mid-run."""
    # LMS and IPNDM take their order from the step's number; steps of the single-step DPM-Solver come in
    # groups; Runge-Kutta steps of PNDM make the history that those after them must have.
    bound = any(hasattr(scheduler, name) for name in ("derivatives", "order_list"))
    bound |= hasattr(scheduler, "ets") and not hasattr(scheduler, "counter")
    runge_kutta = getattr(scheduler, "prk_timesteps", None)
    if bound or (runge_kutta is not None and len(runge_kutta)):
        raise CompositionError(
            f"solver_history='drop': {type(scheduler).__name__} cannot start anew in the midst of a run. "
            "Choose another solver, such as dpm++2m, unipc or ddim, or keep the history."
        )


@contextmanager
def restarted(scheduler: Any) -> Iterator[None]:
    """Have the scheduler's step inside the block be of first order; one without a history stays as it is."""
    if hasattr(scheduler, "lower_order_nums"):
        scheduler.lower_order_nums = 0
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)
        if hasattr(scheduler, "last_sample"):
            # Without it there is no correction of the step before.
            scheduler.last_sample = None
        yield
    elif hasattr(scheduler, "ets"):
        # PLMS takes a step of first order in the first call of a run only, and in the second does it again:
        # that one is passed over.
        scheduler.ets = []
        calls, scheduler.counter = scheduler.counter, 0
        yield
        scheduler.counter, scheduler.cur_sample = calls + 1, None
    else:
        yield
