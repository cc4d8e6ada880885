"""Weights given for a while, and the base's own given back to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import AdapterError
from studio.registry import KINDS


def _state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": parameter.detach().clone()
        for component, module in components_of(pipe).items()
        for name, parameter in module.named_parameters()
    }


def _same(pipe: Any, before: dict[str, torch.Tensor]) -> bool:
    now = _state(pipe)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def _weighted(adapter: Adapter, weight: float) -> dict[str, list]:
    return {name: [(change, weight)] for name, change in adapter.changes.items()}


def _bank(pipe: Any, adapter: Adapter, **options: Any) -> WeightBank:
    return WeightBank(components_of(pipe), adapter.changes, **options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_are_the_formula_rounded_once(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str, dtype: torch.dtype
) -> None:
    pipe = tiny_sd().to(dtype)
    one, two = everywhere(pipe, kind=kind, seed=1), everywhere(pipe, kind=kind, seed=2)
    components = components_of(pipe)
    base = {name: find_parameter(components, name).detach().clone() for name in one.changes}
    bank = _bank(pipe, one)
    bank.apply({name: [(one.changes[name], 0.8), (two.changes[name], -0.5)] for name in one.changes})
    for name, weight in base.items():
        deltas = [(one.changes[name], 0.8), (two.changes[name], -0.5)]
        wanted = weight.double() + sum(
            change.delta(weight, weight=scale).double() for change, scale in deltas
        )
        # Half a unit in the last place for the rounding, and fp32's error for the sum.
        bound = wanted.abs() * torch.finfo(dtype).eps * 0.5 + 1e-5
        assert bool(((find_parameter(components, name).double() - wanted).abs() <= bound).all()), name


@pytest.mark.parametrize("storage", ["auto", "device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_bit_returns_after_many_changes(
    tiny_sd: Callable[[], Any],
    everywhere: Callable[..., Adapter],
    kind: str,
    dtype: torch.dtype,
    storage: str,
) -> None:
    pipe = tiny_sd().to(dtype)
    adapter, before = everywhere(pipe, kind=kind), _state(pipe)
    with _bank(pipe, adapter, storage=storage) as bank:
        for weight in (0.3, 1.0, -2.0, 0.7):
            bank.apply(_weighted(adapter, weight))
        assert not _same(pipe, before)
    assert _same(pipe, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_bit_returns_after_an_exception(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str
) -> None:
    pipe = tiny_sd()
    adapter, before = everywhere(pipe, kind=kind), _state(pipe)
    with pytest.raises(KeyboardInterrupt), _bank(pipe, adapter) as bank:
        bank.apply(_weighted(adapter, 1.0))
        raise KeyboardInterrupt
    assert _same(pipe, before)


def test_change_that_fails_halfway_leaves_the_base_as_it_was(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = tiny_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    names = list(adapter.changes)
    wrong = KINDS["lora"].sample((3, 2), generator=torch.Generator())
    bank = _bank(pipe, adapter)
    bank.apply(_weighted(adapter, 1.0))
    with pytest.raises(
        AdapterError, match=r"has shape \[3, 2\], the parameter .* Load the adapter with base="
    ):
        bank.apply({**_weighted(adapter, 1.0), names[-1]: [(wrong, 1.0)]})
    assert _same(pipe, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weight_zero_touches_nothing(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str
) -> None:
    pipe = tiny_sd()
    adapter, before = everywhere(pipe, kind=kind), _state(pipe)
    bank = _bank(pipe, adapter)
    versions = [find_parameter(components_of(pipe), name)._version for name in bank.names]
    bank.apply(_weighted(adapter, 0.0))
    assert _same(pipe, before)
    assert [find_parameter(components_of(pipe), name)._version for name in bank.names] == versions


def test_parameters_that_are_not_named_again_return(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = tiny_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    first, second = list(adapter.changes)[:2]
    bank = _bank(pipe, adapter)
    bank.apply({first: [(adapter.changes[first], 1.0)]})
    bank.apply({second: [(adapter.changes[second], 1.0)]})
    changed = {name for name, value in _state(pipe).items() if not torch.equal(value, before[name])}
    assert changed == {second}
    bank.apply({})
    assert _same(pipe, before)


def test_memory_of_the_parameters_stays_where_it_was(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = tiny_sd()
    adapter = everywhere(pipe)
    parameters = [find_parameter(components_of(pipe), name) for name in adapter.changes]
    pointers = [parameter.data_ptr() for parameter in parameters]
    with _bank(pipe, adapter) as bank:
        assert bank.nbytes == sum(parameter.nbytes for parameter in parameters)
        bank.apply(_weighted(adapter, 1.0))
        assert [parameter.data_ptr() for parameter in parameters] == pointers
    assert [parameter.data_ptr() for parameter in parameters] == pointers


def test_bank_follows_parameters_whose_data_was_replaced(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe, fresh = tiny_sd(), tiny_sd()
    adapter = everywhere(pipe)
    bank, theirs = _bank(pipe, adapter), _bank(fresh, adapter)
    for module in components_of(pipe).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # What moving a module between devices does.
    bank.apply(_weighted(adapter, 0.9))
    theirs.apply(_weighted(adapter, 0.9))
    assert _same(pipe, _state(fresh))
    bank.restore()
    assert _same(pipe, _state(tiny_sd()))


def test_bank_follows_a_change_of_precision(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = tiny_sd()
    adapter = everywhere(pipe)
    bank = _bank(pipe, adapter)
    bank.apply(_weighted(adapter, 1.0))
    pipe.to(torch.float16)
    bank.restore()
    assert _same(pipe, _state(tiny_sd().to(torch.float16)))


def test_merged_weights_cost_no_operation(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += 1
            return function(*args, **(kwargs or {}))

    pipe = tiny_sd()
    adapter = everywhere(pipe)

    def operations() -> int:
        with torch.no_grad(), Count() as count:
            pipe.unet(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 77, 32))
        return count.total

    plain = operations()
    with _bank(pipe, adapter) as bank:
        bank.apply(_weighted(adapter, 1.0))
        assert operations() == plain > 100


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_must_be_finite(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], weight: float
) -> None:
    pipe = tiny_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    with pytest.raises(AdapterError, match=r"must be a finite number"):
        _bank(pipe, adapter).apply(_weighted(adapter, weight))
    assert _same(pipe, before)


def test_bank_refuses_what_it_does_not_keep_and_what_has_no_memory(tiny_sd: Callable[[], Any]) -> None:
    components = components_of(tiny_sd())
    bank = WeightBank(components, ["unet.conv_in.weight"])
    with pytest.raises(AdapterError, match=r"does not keep 'unet.conv_out.weight'"):
        bank.apply({"unet.conv_out.weight": []})
    components["unet"].conv_in.to("meta")
    with pytest.raises(AdapterError, match=r"is offloaded layer by layer.*enable_model_cpu_offload"):
        WeightBank(components, ["unet.conv_in.weight"])
    tail = "encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(AdapterError, match=r"are one parameter"):
        WeightBank(components, [f"text_encoder.{tail}", f"text_encoder.text_model.{tail}"])


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["auto", "device", "cpu"])
def test_bank_follows_the_pipeline_to_the_gpu_and_back(
    tiny_sd: Callable[[], Any], everywhere: Callable[..., Adapter], storage: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pipe = tiny_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    pipe.to("cuda")
    bank = _bank(pipe, adapter, storage=storage)
    pipe.to("cpu")
    bank.apply(_weighted(adapter, 0.8))
    pipe.to("cuda")
    bank.apply(_weighted(adapter, -0.4))
    name = next(iter(adapter.changes))
    wanted = before[name] + adapter.changes[name].delta(before[name], weight=-0.4)
    # fp32 sums in another order on the device.
    assert torch.allclose(find_parameter(components_of(pipe), name).cpu(), wanted, atol=1e-5)
    bank.restore()
    pipe.to("cpu")
    assert _same(pipe, before)
