"""What updates the parameters, by name, from the packages that keep it best."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from studio.errors import TrainingError
from studio.trainers.base import ParameterGroup

Build = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]


def make_optimizer(
    name: str, groups: Sequence[ParameterGroup], *, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of this name, each group with its own rate.

    Args:
        name: As in ``TrainSpec``.
        groups: What it updates.
        weight_decay: In units of the learning rate.

    Raises:
        TrainingError: If its package is not installed, or it cannot work with these groups.
    """
    rates = {group.learning_rate for group in groups}
    if name == "prodigy" and len(rates) > 1:
        raise TrainingError(
            "prodigy finds one learning rate for all that is trained, got several: "
            f"{', '.join(f'{rate:g}' for rate in sorted(rates))}. Leave text_encoder_learning_rate and rates "
            "of parts out, or choose another optimizer."
        )
    parameters = [
        {
            "params": list(group.parameters),
            "lr": group.learning_rate,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]
    try:
        return _BUILDERS[name](parameters, weight_decay)
    except ImportError:
        raise TrainingError(
            f"optimizer '{name}' needs a package that is not installed. Run pip install "
            f"'diffusion-studio[{_EXTRAS[name]}]', or choose another optimizer."
        ) from None


def _adamw(parameters: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    # arXiv:1711.05101
    return torch.optim.AdamW(parameters, weight_decay=weight_decay)


def _adamw8bit(parameters: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    # arXiv:2110.02861
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, weight_decay=weight_decay)
    return optimizer


def _adafactor(parameters: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    # arXiv:1804.04235
    return torch.optim.Adafactor(parameters, weight_decay=weight_decay)


def _prodigy(parameters: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    # arXiv:2306.06101; bias correction and the safeguard as its authors advise for diffusion models.
    from pytorch_optimizer import Prodigy

    optimizer: torch.optim.Optimizer = Prodigy(
        parameters, weight_decay=weight_decay, bias_correction=True, safeguard_warmup=True
    )
    return optimizer


def _lion(parameters: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    # arXiv:2302.06675
    from pytorch_optimizer import Lion

    optimizer: torch.optim.Optimizer = Lion(parameters, weight_decay=weight_decay)
    return optimizer


_BUILDERS: Mapping[str, Build] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "lion": _lion,
}
_EXTRAS = {"adamw8bit": "gpu", "prodigy": "optimizers", "lion": "optimizers"}
