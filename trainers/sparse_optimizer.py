"""What updates the chosen entries of weights: an AdamW of their own, or any optimizer of torch's kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from studio.trainers.sparse_parameters import SparseParameters


class SparseAdamW(torch.optim.Optimizer):
    """AdamW, arXiv:1711.05101, on the vectors of ``SparseParameters``, each step written into the weights.

    On the chosen entries it does bit for bit what ``torch.optim.AdamW`` does. Its state is two moments per
    entry; a group whose vector has another length than at the last step starts anew.

    Args:
        parts: One group of the optimizer each.
        learning_rates: Of the parts.
        weight_decay: Decoupled decay, in units of the learning rate.
        betas: Decay of the first and second moments.
        eps: Added to the root of the second moments.
    """

    def __init__(
        self,
        parts: Sequence[SparseParameters],
        *,
        learning_rates: Sequence[float],
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._sparse = list(parts)
        groups = [
            {"params": [part.values], "lr": rate} for part, rate in zip(parts, learning_rates, strict=True)
        ]
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._sparse, self.param_groups, strict=True):
            values = part.values
            if values.grad is None:
                continue
            state = self.state[values]
            if not state or state["exp_avg"].shape != values.shape:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
            state["step"] += 1
            part.plan.adamw_(
                values.detach(),
                values.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                step=state["step"],
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss


def write_each_step(
    optimizer: torch.optim.Optimizer, parts: Sequence[SparseParameters]
) -> Callable[[], None]:
    """Have an optimizer of the vectors of ``SparseParameters`` write each of its steps into the weights.

    Returns:
        What makes it start anew but for its rates: to be called when the vectors have another length.
    """
    start = [_settings(group) for group in optimizer.param_groups]

    def write(*_: Any) -> None:
        for part in parts:
            part.write_trained()

    def start_anew() -> None:
        optimizer.state.clear()
        for group, settings in zip(optimizer.param_groups, start, strict=True):
            # Some count steps there, or estimate what they go on with.
            for name in _settings(group).keys() - settings.keys():
                del group[name]
            group.update(settings)

    optimizer.register_step_post_hook(write)
    return start_anew


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer keeps of a group beside parameters and rates."""
    return {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
