"""What updates the parameters, by name, from the packages that keep it best."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from studio.errors import TrainingError
from studio.registry import nearest
from studio.specs.train import TrainSpec
from studio.trainers.base import ParameterGroup, Trainer

Kind = tuple[Callable[..., torch.optim.Optimizer], Mapping[str, Any]]
"""A class, and those of its settings that are not its own defaults here."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_NOT_ASKED = {"params", "parts", "learning_rates", *_ELSEWHERE}


def optimizer_of(
    trainer: Trainer, groups: Sequence[ParameterGroup], spec: TrainSpec
) -> torch.optim.Optimizer:
    """Return what updates a method's parameters as a run asks.

    Raises:
        TrainingError: If the method cannot work with it, it is not installed, or it refuses an option.
    """
    return trainer.optimizer(
        groups, name=spec.optimizer, weight_decay=spec.weight_decay, options=spec.optimizer_options
    )


def make_optimizer(
    name: str,
    groups: Sequence[ParameterGroup],
    *,
    weight_decay: float,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> torch.optim.Optimizer:
    """Return the optimizer of this name, each group with its own rate.

    Args:
        name: As in ``TrainSpec``.
        groups: What it updates.
        weight_decay: In units of the learning rate.
        options: Further arguments of its constructor.

    Raises:
        TrainingError: If its package is not installed, it cannot work with these groups, or it does not know
            an option or takes no such value of it.
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
        kind, own = _KINDS[name]()
    except ImportError:
        raise TrainingError(
            f"optimizer '{name}' needs a package that is not installed. Run pip install "
            f"'diffusion-studio[{_EXTRAS[name]}]', or choose another optimizer."
        ) from None
    check_options(name, kind, options)
    try:
        return kind(parameters, weight_decay=weight_decay, **{**own, **options})
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if not options:
            raise
        given = ", ".join(f"{option} = {value}" for option, value in options.items())
        raise TrainingError(
            f"optimizer_options: '{name}' refuses {given} ({error}). Correct or leave out what it names."
        ) from None


def check_options(name: str, kind: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check that a constructor has arguments of these names that a user may set.

    Args:
        name: What the user calls the optimizer.
        kind: Its class.
        options: By name.

    Raises:
        TrainingError: If it lacks one, or another setting of the run says it; names all that it has.
    """
    known = [
        parameter.name
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name not in _NOT_ASKED and parameter.kind is not parameter.VAR_KEYWORD
    ]
    problems = [
        f"{option} is what {_ELSEWHERE[option]} says."
        if option in _ELSEWHERE
        else f"'{name}' has no {option}.{nearest(option, known)}"
        for option in options
        if option not in known
    ]
    if problems:
        raise TrainingError(f"optimizer_options: {' '.join(problems)} It takes {', '.join(known)}.")


def _adamw() -> Kind:
    # arXiv:1711.05101. One kernel for all tensors, on a CPU too, and no temporary copies of them.
    return torch.optim.AdamW, {"fused": True}


def _adamw8bit() -> Kind:
    # arXiv:2110.02861
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit, {}


def _adafactor() -> Kind:
    # arXiv:1804.04235
    return torch.optim.Adafactor, {}


def _prodigy() -> Kind:
    # arXiv:2306.06101; bias correction and the safeguard as its authors advise for diffusion models.
    from pytorch_optimizer import Prodigy

    return Prodigy, {"bias_correction": True, "safeguard_warmup": True}


def _lion() -> Kind:
    # arXiv:2302.06675
    from pytorch_optimizer import Lion

    return Lion, {}


_KINDS: Mapping[str, Callable[[], Kind]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "lion": _lion,
}
_EXTRAS = {"adamw8bit": "gpu", "prodigy": "optimizers", "lion": "optimizers"}
