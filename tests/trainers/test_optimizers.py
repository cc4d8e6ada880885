import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from studio.errors import TrainingError
from studio.specs import TrainSpec
from studio.trainers.base import ParameterGroup
from studio.trainers.loop import train
from studio.trainers.optimizers import make_optimizer
from studio.trainers.run_folder import RunFolder

Spec = Callable[..., TrainSpec]
NAMES = get_args(TrainSpec.model_fields["optimizer"].annotation)


def groups(*rates: float) -> list[ParameterGroup]:
    torch.manual_seed(0)
    return [ParameterGroup("unet", [nn.Parameter(torch.randn(6, 4))], rate) for rate in rates]


def stepped(name: str, found: list[ParameterGroup], *, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    optimizer = make_optimizer(name, found, weight_decay=weight_decay)
    for group in found:
        for parameter in group.parameters:
            parameter.grad = torch.linspace(-1, 1, 24).view(6, 4)
    optimizer.step()
    return optimizer


def installed(name: str) -> str:
    package = {"adamw8bit": "bitsandbytes", "lion": "pytorch_optimizer", "prodigy": "pytorch_optimizer"}
    if name in package:
        pytest.importorskip(package[name], reason=f"{package[name]} is not installed")
    if name == "adamw8bit" and not torch.cuda.is_available():
        pytest.skip("8-bit moments need a GPU")
    return name


def test_each_group_has_its_own_rate() -> None:
    for name in ("adamw", "adafactor", "lion"):
        optimizer = make_optimizer(installed(name), groups(1e-2, 1e-3), weight_decay=0.1)
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
        assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_lion_steps_by_the_sign() -> None:
    found = groups(1e-2)
    before = found[0].parameters[0].detach().double().clone()
    stepped(installed("lion"), found)
    wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * torch.linspace(-1, 1, 24).view(6, 4).sign()
    assert torch.allclose(found[0].parameters[0].double(), wanted, atol=1e-7)  # fp32


def test_adamws_first_step_is_the_rate() -> None:
    found = groups(1e-2)
    before = found[0].parameters[0].detach().double().clone()
    stepped("adamw", found)
    gradient = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(found[0].parameters[0].double(), wanted, atol=1e-6)  # fp32


def test_adafactor_keeps_rows_and_columns_only() -> None:
    found = groups(1e-2)
    optimizer = stepped("adafactor", found)
    kept = optimizer.state[found[0].parameters[0]]
    assert sum(value.numel() for value in kept.values()) <= 6 + 4 + 1


def test_prodigy_finds_one_rate_for_all() -> None:
    installed("prodigy")
    make_optimizer("prodigy", groups(1.0, 1.0), weight_decay=0.0)
    with pytest.raises(TrainingError, match=r"one learning rate.*got several: 0\.5, 1\. Leave"):
        make_optimizer("prodigy", groups(1.0, 0.5), weight_decay=0.0)


@pytest.mark.parametrize(
    ("name", "extra"), [("lion", "optimizers"), ("prodigy", "optimizers"), ("adamw8bit", "gpu")]
)
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    for package in ("pytorch_optimizer", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=rf"'{name}' needs a package.*diffusion-studio\[{extra}\]"):
        make_optimizer(name, groups(1e-3), weight_decay=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains(tiny_sd: Callable[[], Any], spec: Spec, name: str) -> None:
    installed(name)
    adapter = train(tiny_sd(), spec(optimizer=name, steps=2, train_text_encoder=True))
    assert any(bool(change.up.any()) for change in adapter.changes.values())  # type: ignore[attr-defined]
    assert adapter.metadata["ss_optimizer"] == name


def test_default_rates_are_those_that_the_optimizer_wants(spec: Spec) -> None:
    own = spec().unet_learning_rate
    assert spec(optimizer="lion").unet_learning_rate == own / 10
    assert (
        spec(optimizer="prodigy").unet_learning_rate == spec(optimizer="prodigy").encoder_learning_rate == 1
    )
    assert spec(optimizer="lion", learning_rate=0.5).unet_learning_rate == 0.5


def test_options_reach_the_constructor_as_the_values_they_spell(spec: Spec) -> None:
    given = {" betas ": "0.8, 0.99", "eps": "1e-6", "amsgrad": "true"}
    options = spec(optimizer_options=given).optimizer_options
    assert options == {"betas": (0.8, 0.99), "eps": 1e-6, "amsgrad": True}
    optimizer = make_optimizer("adamw", groups(1e-2), weight_decay=0.1, options=options)
    assert optimizer.defaults | dict(options) == optimizer.defaults
    with pytest.raises(ValueError, match="eps must be a number, true or false"):
        spec(optimizer_options={"eps": {"a": 1}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.9}, "'adamw' has no beta. Did you mean 'betas'. It takes betas, eps, amsgrad"),
        ({"lr": 1e-3}, "lr is what learning_rate says"),
        ({"betas": (2.0, 0.9)}, r"'adamw' refuses betas = \(2.0, 0.9\) \(Invalid beta parameter.*Correct or"),
        ({"betas": 0.9}, "'adamw' refuses betas = 0.9 "),
    ],
    ids=["unknown", "elsewhere", "value", "type"],
)
def test_options_that_do_not_fit_are_refused_before_an_earlier_run_is_replaced(
    tiny_sd: Callable[[], Any], spec: Spec, options: dict[str, Any], words: str
) -> None:
    run = spec(overwrite=True, optimizer_options=options)
    kept = RunFolder(run.output).checkpoints / "000001.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    with pytest.raises(TrainingError, match=f"optimizer_options: {words}"):
        train(tiny_sd(), run)
    assert kept.exists()


def test_saras_own_adamw_takes_options_too(tiny_sd: Callable[[], Any], spec: Spec) -> None:
    own = spec(steps=1).model_dump(exclude={"options", "method"}) | {"method": "sara", "overwrite": True}
    run = TrainSpec.model_validate(own | {"optimizer_options": {"eps": 1.0}})
    plain = train(tiny_sd(), TrainSpec.model_validate(own))
    damped = train(tiny_sd(), run)
    name, change = next(iter(plain.changes.items()))
    assert change.values.abs().mean() > 10 * damped.changes[name].values.abs().mean()  # type: ignore[attr-defined]
    assert damped.metadata["ss_optimizer"] == "adamw(eps=1.0)"
    with pytest.raises(TrainingError, match=r"'adamw' has no amsgrad\. It takes betas, eps\."):
        train(tiny_sd(), TrainSpec.model_validate(own | {"optimizer_options": {"amsgrad": True}}))
