"""Weights given for a while, and the base's own given back to the bit."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.parameters import components_of, find_parameter
from studio.adapters.resident import FREE_SHARE, spare_memory
from studio.errors import AdapterError
from studio.registry import KINDS

WAYS = ("swap", "copy", "form")


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


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
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str, dtype: torch.dtype
) -> None:
    pipe = short_sd().to(dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_ways_leave_the_same_bits_and_give_the_base_back(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str, dtype: torch.dtype
) -> None:
    pipe = short_sd().to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    one, two = everywhere(pipe, kind=kind, seed=1), everywhere(pipe, kind=kind, seed=2)
    before = _state(pipe)
    strides = {name: find_parameter(components_of(pipe), name).stride() for name in one.changes}
    found = []
    for way in WAYS:
        with _bank(pipe, one, way=way) as bank:
            for weight in (0.3, -1.0, 0.3):
                bank.apply(
                    {name: [(one.changes[name], weight), (two.changes[name], 0.7)] for name in one.changes}
                )
            found.append(_state(pipe))
            now = {name: find_parameter(components_of(pipe), name).stride() for name in one.changes}
            assert now == strides
        assert not _same(pipe, found[0]) and _same(pipe, before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_bit_returns_after_an_exception(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe, kind=kind), _state(pipe)
    with pytest.raises(KeyboardInterrupt), _bank(pipe, adapter) as bank:
        bank.apply(_weighted(adapter, 1.0))
        raise KeyboardInterrupt
    assert _same(pipe, before)


@pytest.mark.parametrize("way", WAYS)
def test_change_that_fails_halfway_leaves_the_base_as_it_was(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    names = list(adapter.changes)
    wrong = KINDS["lora"].sample((3, 2), generator=torch.Generator())
    bank = _bank(pipe, adapter, way=way)
    bank.apply(_weighted(adapter, 1.0))
    with pytest.raises(
        AdapterError, match=r"has shape \[3, 2\], the parameter .* Load the adapter with base="
    ):
        bank.apply({**_weighted(adapter, 1.0), names[-1]: [(wrong, 1.0)]})
    assert _same(pipe, before)

    class Failing:
        shape = adapter.changes[names[-1]].shape

        def low_rank(self) -> None:
            raise KeyboardInterrupt

    bank.apply(_weighted(adapter, 1.0))
    with pytest.raises(KeyboardInterrupt):
        bank.apply({**_weighted(adapter, 0.5), names[-1]: [(Failing(), 1.0)]})
    assert _same(pipe, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weight_zero_touches_nothing(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe, kind=kind), _state(pipe)
    bank = _bank(pipe, adapter)
    versions = [find_parameter(components_of(pipe), name)._version for name in bank.names]
    bank.apply(_weighted(adapter, 0.0))
    assert _same(pipe, before)
    assert [find_parameter(components_of(pipe), name)._version for name in bank.names] == versions


def test_parameters_that_are_not_named_again_return(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    first, second = list(adapter.changes)[:2]
    bank = _bank(pipe, adapter)
    bank.apply({first: [(adapter.changes[first], 1.0)]})
    bank.apply({second: [(adapter.changes[second], 1.0)]})
    changed = {name for name, value in _state(pipe).items() if not torch.equal(value, before[name])}
    assert changed == {second}
    bank.apply({})
    assert _same(pipe, before)


@pytest.mark.parametrize("way", WAYS)
def test_memory_of_the_parameters_stays_theirs(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe)
    parameters = [find_parameter(components_of(pipe), name) for name in adapter.changes]
    pointers = [parameter.data_ptr() for parameter in parameters]
    size = sum(parameter.nbytes for parameter in parameters)
    with _bank(pipe, adapter, way=way) as bank:
        assert bank.nbytes == (0 if way == "swap" else size)
        for weight in (1.0, 0.5):
            bank.apply(_weighted(adapter, weight))
            inside = [parameter.data_ptr() for parameter in parameters]
            assert inside != pointers if way == "swap" else inside == pointers
        assert bank.resident_nbytes == (0 if way == "form" else 2 * size)
    assert [parameter.data_ptr() for parameter in parameters] == pointers


@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_switches_leave_no_trace_and_keep_to_the_budget(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str
) -> None:
    pipe = short_sd()
    before = _state(pipe)
    adapters = [everywhere(pipe, seed=seed) for seed in range(3)]
    names = random.Random(0).sample(sorted(adapters[0].changes), 5)
    parameters = {name: find_parameter(components_of(pipe), name) for name in names}
    homes = {name: parameter.untyped_storage()._cdata for name, parameter in parameters.items()}
    budget = int(2.5 * sum(parameter.nbytes for parameter in parameters.values()))
    draw = random.Random(1)
    bank = WeightBank(components_of(pipe), names, way=way, budget=budget)
    with bank:
        for _ in range(1000):
            weighting = {
                name: [
                    (adapter.changes[name], draw.choice((0, 0.5, draw.random()))) for adapter in adapters[:2]
                ]
                for name in draw.sample(names, draw.randint(0, 5))
            }
            bank.apply(weighting)
            assert bank.resident_nbytes <= budget
        expected = {name: value.clone() for name, value in parameters.items()}
        fresh = components_of(short_sd())
        WeightBank(fresh, names).apply(weighting)
        assert all(torch.equal(expected[name], find_parameter(fresh, name)) for name in names)
    assert _same(pipe, before)
    assert {name: value.untyped_storage()._cdata for name, value in parameters.items()} == homes


@pytest.mark.parametrize(
    ("way", "wanted"), [("swap", {}), ("copy", {"copy_.default": 1})], ids=["swap", "copy"]
)
def test_a_switch_back_costs_no_arithmetic(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str, wanted: dict[str, int]
) -> None:
    pipe = short_sd()
    adapters = [everywhere(pipe, seed=seed) for seed in range(2)]
    with _bank(pipe, adapters[0], way=way) as bank:
        recipes = [bank.recipe(_weighted(adapter, 0.7)) for adapter in adapters]
        for recipe in recipes:
            bank.apply(recipe)
        count = len(adapters[0].changes)
        with Operations() as operations:
            bank.apply(recipes[0])
        assert operations.counts == {name: number * count for name, number in wanted.items()}
        # The same weighting said anew is the same.
        with Operations() as operations:
            bank.apply(_weighted(adapters[0], 0.7))
        assert not operations.counts


def test_the_least_recently_used_weights_make_room(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe)
    size = sum(find_parameter(components_of(pipe), name).nbytes for name in adapter.changes)
    with _bank(pipe, adapter, way="swap", budget=2 * size) as bank:

        def arithmetic(weight: float) -> int:
            with Operations() as operations:
                bank.apply(_weighted(adapter, weight))
            return operations.counts.total()

        assert arithmetic(0.1) and arithmetic(0.2)
        assert not arithmetic(0.1)
        assert arithmetic(0.3)
        assert not arithmetic(0.1)
        assert arithmetic(0.2)
        assert bank.resident_nbytes == 2 * size == bank.budget


@pytest.mark.parametrize("way", ["copy", "form"])
@pytest.mark.parametrize("storage", ["auto", "device", "cpu"])
def test_pristine_copies_may_lie_anywhere(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str, storage: str
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    with _bank(pipe, adapter, way=way, storage=storage) as bank:
        bank.apply(_weighted(adapter, 0.5))
        assert not _same(pipe, before)
    assert _same(pipe, before)


def test_the_way_follows_the_budget(short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]) -> None:
    pipe = short_sd()
    adapter, components = everywhere(pipe), components_of(pipe)
    size = sum(find_parameter(components, name).nbytes for name in adapter.changes)
    for budget, way in ((size, "swap"), (size - 2, "form"), (0, "form")):
        bank = _bank(pipe, adapter, budget=budget)
        assert set(bank.ways) == {"unet", "text_encoder"} and bank.ways["unet"] == way
        assert bank.budget <= budget
    assert _bank(pipe, adapter).ways == {"unet": "swap", "text_encoder": "swap"}
    with pytest.raises(AdapterError, match=rf"needs {size} bytes.*Raise the budget"):
        _bank(pipe, adapter, way="swap", budget=7)


def test_what_others_move_or_compile_keeps_its_memory(short_sd: Callable[[], Any]) -> None:
    from accelerate import cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    name, pipe = "unet.conv_in.weight", short_sd()
    components = components_of(pipe)

    def way() -> str:
        return WeightBank(components, [name]).ways["unet"]

    assert way() == "swap"
    _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    assert way() == "copy"
    hook.remove()
    assert way() == "swap"
    cpu = torch.device("cpu")
    apply_group_offloading(
        pipe.unet.mid_block, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    assert way() == "copy"


def test_a_compiled_module_is_traced_once(short_sd: Callable[[], Any]) -> None:
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    compiled = torch.compile(layer, backend=backend)
    change = KINDS["lora"].sample((4, 4), generator=torch.Generator().manual_seed(0))
    x, weight = torch.ones(1, 4), layer.weight.clone()
    with WeightBank({"unet": compiled}, ["unet.weight"]) as bank:
        assert bank.ways == {"unet": "copy"}
        for strength in (0.5, 1.0, 0.5):
            bank.apply({"unet.weight": [(change, strength)]})
            wanted = x @ (weight + change.delta(weight, weight=strength)).t() + layer.bias
            assert torch.allclose(compiled(x), wanted, atol=1e-6)
    assert torch.allclose(compiled(x), x @ weight.t() + layer.bias, atol=1e-6) and len(traced) == 1
    layer.compile(backend=backend)
    assert WeightBank({"unet": torch.nn.Sequential(layer)}, ["unet.0.weight"]).ways == {"unet": "copy"}


@pytest.mark.parametrize("way", WAYS)
def test_bank_follows_parameters_whose_data_was_replaced(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str
) -> None:
    pipe, fresh = short_sd(), short_sd()
    adapter = everywhere(pipe)
    bank, theirs = _bank(pipe, adapter, way=way), _bank(fresh, adapter, way=way)
    for weight in (0.9, 0.4, 0.9):
        for module in components_of(pipe).values():
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()  # What moving a module between devices does.
        bank.apply(_weighted(adapter, weight))
        theirs.apply(_weighted(adapter, weight))
        assert _same(pipe, _state(fresh))
    bank.restore()
    assert _same(pipe, _state(short_sd()))


@pytest.mark.parametrize("way", WAYS)
def test_bank_follows_a_change_of_precision(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], way: str
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe)
    bank = _bank(pipe, adapter, way=way)
    bank.apply(_weighted(adapter, 1.0))
    pipe.to(torch.float16)
    # What has been rounded with the module is formed anew from the rounded base.
    fresh = short_sd().to(torch.float16)
    bank.apply(_weighted(adapter, 1.0))
    with _bank(fresh, adapter) as other:
        other.apply(_weighted(adapter, 1.0))
        assert _same(pipe, _state(fresh))
    bank.restore()
    assert _same(pipe, _state(fresh))


def test_merged_weights_cost_no_operation(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe)

    def operations() -> int:
        with torch.no_grad(), Operations() as found:
            pipe.unet(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 77, 32))
        return found.counts.total()

    plain = operations()
    with _bank(pipe, adapter) as bank:
        bank.apply(_weighted(adapter, 1.0))
        assert operations() == plain > 100


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_must_be_finite(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], weight: float
) -> None:
    pipe = short_sd()
    adapter, before = everywhere(pipe), _state(pipe)
    with pytest.raises(AdapterError, match=r"must be a finite number"):
        _bank(pipe, adapter).apply(_weighted(adapter, weight))
    assert _same(pipe, before)


def test_bank_refuses_what_it_does_not_keep_and_what_has_no_memory(short_sd: Callable[[], Any]) -> None:
    components = components_of(short_sd())
    bank = WeightBank(components, ["unet.conv_in.weight"])
    with pytest.raises(AdapterError, match=r"does not keep 'unet.conv_out.weight'"):
        bank.apply({"unet.conv_out.weight": []})
    components["unet"].conv_in.to("meta")
    with pytest.raises(AdapterError, match=r"is offloaded layer by layer.*enable_model_cpu_offload"):
        WeightBank(components, ["unet.conv_in.weight"])
    tail = "encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(AdapterError, match=r"are one parameter"):
        WeightBank(components, [f"text_encoder.{tail}", f"text_encoder.text_model.{tail}"])


def test_a_recipe_is_checked_before_anything_is_touched_and_is_its_banks_own(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    pipe = short_sd()
    adapter = everywhere(pipe)
    bank, other = _bank(pipe, adapter), _bank(short_sd(), adapter)
    bank.apply(_weighted(adapter, 0.4))
    acting = _state(pipe)
    with pytest.raises(AdapterError, match="must be a finite number"):
        bank.recipe(_weighted(adapter, float("nan")))
    assert _same(pipe, acting)
    with pytest.raises(ValueError, match="made by another bank"):
        bank.apply(other.recipe({}))
    bank.restore()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_applied_in_inference_mode_stays_usable_outside(
    short_sd: Callable[[], Any], way: str
) -> None:
    pipe, name = short_sd(), "unet.conv_in.weight"
    parameter = find_parameter(components_of(pipe), name)
    change = KINDS["lora"].sample(tuple(parameter.shape), generator=torch.Generator().manual_seed(0))
    with WeightBank(components_of(pipe), [name], way=way) as bank:
        with torch.inference_mode():
            bank.apply({name: [(change, 0.5)]})
        image = torch.ones(1, 4, 8, 8, requires_grad=True)
        pipe.unet.conv_in(image).sum().backward()
        assert image.grad is not None and not parameter.is_inference()


def test_memory_that_pytorch_keeps_ready_is_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabytes = {"mem_get_info": (2, 8), "memory_reserved": 5, "memory_allocated": 1}
    for name, value in gigabytes.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert spare_memory(torch.device("cuda")) == 2 + 5 - 1 - 8 * FREE_SHARE


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["auto", "device", "cpu"])
def test_bank_follows_the_pipeline_to_the_gpu_and_back(
    short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], storage: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pipe = short_sd()
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
