"""Low-rank changes beside the weights: they agree with the bank, and leave no trace."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from studio.adapters.adapter import Adapter, Change
from studio.adapters.bank import WeightBank
from studio.adapters.live import LiveLayers
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import AdapterError
from studio.registry import KINDS

Changes = Mapping[str, list[tuple[Change, float]]]
# fp32 sums in another order, through all layers of the tiny base.
FP32_ERROR = 1e-5


class Operations(TorchDispatchMode):
    """Counts operations by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _forward(pipe: Any, rows: int = 2) -> torch.Tensor:
    dtype = pipe.unet.dtype
    sample, text = _random(6, 4, 8, 8, seed=1)[:rows].to(dtype), _random(6, 77, 32, seed=2)[:rows].to(dtype)
    answer: torch.Tensor = pipe.unet(sample, torch.tensor(500), text).sample
    return answer


def _weighted(*pairs: tuple[Adapter, float]) -> Changes:
    return {
        name: [(adapter.changes[name], weight) for adapter, weight in pairs] for name in pairs[0][0].changes
    }


def _merged(pipe: Any, changes: Changes, rows: int = 2) -> torch.Tensor:
    with WeightBank(components_of(pipe), changes) as bank:
        bank.apply(changes)
        return _forward(pipe, rows)


@pytest.fixture(scope="module")
def pipe(short_sd: Callable[[], Any]) -> Any:
    """Return one base for all tests, each of which leaves it as it was."""
    return short_sd()


@pytest.fixture(scope="module")
def adapters(pipe: Any, everywhere: Callable[..., Adapter]) -> list[Adapter]:
    """Return three LoRAs on every linear layer and convolution of the UNet's blocks."""
    found = [everywhere(pipe, seed=seed, components=("unet",)) for seed in range(3)]
    # Another rank for one of them.
    ranked = {
        name: change if i % 2 else _cut(change) for i, (name, change) in enumerate(found[2].changes.items())
    }
    return [*found[:2], Adapter("ranked", "lora", ranked)]


def _cut(change: Any) -> Change:
    cut: Change = type(change)(change.down[:1], change.up[:, :1], 0.7)
    return cut


def _live(pipe: Any, adapters: list[Adapter]) -> LiveLayers:
    return LiveLayers(components_of(pipe), adapters[0].changes)


def test_one_weighting_gives_what_the_bank_gives(pipe: Any, adapters: list[Adapter]) -> None:
    weightings = [(0.4, -0.2, 0.3), (0.4, 0.1, 0.3), (0.0, 0.5, 0.0), (0.4, -0.2, 0.3)]
    with _live(pipe, adapters) as live:
        for weights in weightings:
            changes = _weighted(*zip(adapters, weights, strict=True))
            live.apply(changes)
            got = _forward(pipe)
            live.apply({})
            assert (got - _merged(pipe, changes)).abs().max() < FP32_ERROR


@pytest.mark.parametrize(
    "rows", [[0, 0, 1, 1, 2, 2], [2, -1, 0, 1, 2, 0], [0, 0, 0, 1, -1, 2]], ids=["sorted", "mixed", "unequal"]
)
def test_each_row_gets_what_the_bank_gives_its_branch(
    pipe: Any, adapters: list[Adapter], rows: list[int]
) -> None:
    first = next(iter(adapters[0].changes))
    branches: list[Changes] = [
        _weighted((adapters[0], 0.5)),
        {first: [(adapters[1].changes[first], 0.7)]},
        _weighted((adapters[2], -0.4), (adapters[1], 0.2)),
    ]
    wanted = [*(_merged(pipe, changes, len(rows)) for changes in branches), _forward(pipe, len(rows))]
    with _live(pipe, adapters) as live:
        live.apply_indexed(branches, rows=rows)
        got = _forward(pipe, len(rows))
    for place, row in enumerate(rows):
        assert (got[place] - wanted[row][place]).abs().max() < FP32_ERROR, place


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_in_16_bits_the_error_is_at_most_twice_the_banks(
    short_sd: Callable[[], Any], pipe: Any, adapters: list[Adapter], dtype: torch.dtype
) -> None:
    changes = _weighted((adapters[0], 0.1), (adapters[2], -0.1))
    narrow = short_sd().to(dtype)
    exact = short_sd()
    # The 16-bit base in fp32, so that only what is computed with it is rounded.
    exact.unet.load_state_dict({name: value.float() for name, value in narrow.unet.state_dict().items()})
    wanted = _merged(exact, changes)
    with _live(narrow, adapters) as live:
        live.apply(changes)
        got = _forward(narrow)
    errors = [(answer.float() - wanted).square().mean().sqrt() for answer in (got, _merged(narrow, changes))]
    assert errors[0] <= 2 * errors[1]


def test_leaving_brings_back_what_was_there_also_after_an_exception(
    pipe: Any, adapters: list[Adapter]
) -> None:
    layers = [module for module in pipe.unet.modules() if not list(module.children())]
    own = layers[-1]
    own.forward = own.forward  # Something else has shadowed it already, as accelerate's hooks do.
    before = [dict(vars(module)) for module in layers]
    plain = _forward(pipe)
    with pytest.raises(KeyboardInterrupt), _live(pipe, adapters) as live:
        live.apply(_weighted((adapters[0], 1.0)))
        assert not torch.equal(_forward(pipe), plain)
        raise KeyboardInterrupt
    assert [vars(module) for module in layers] == before
    assert torch.equal(_forward(pipe), plain)
    del own.forward


def test_nothing_acts_before_the_first_weighting_and_after_an_empty_one(
    pipe: Any, adapters: list[Adapter]
) -> None:
    with Operations() as operations:
        plain = _forward(pipe)
    with _live(pipe, adapters) as live:
        for changes in (None, {}, _weighted((adapters[0], 0.0))):
            if changes is not None:
                live.apply(_weighted((adapters[0], 1.0)))
                live.apply(changes)
            with Operations() as inside:
                got = _forward(pipe)
            assert torch.equal(got, plain)
            assert inside.counts == operations.counts


def test_two_operations_a_layer_for_any_number_of_adapters_and_branches(
    pipe: Any, adapters: list[Adapter]
) -> None:
    linear = [name for name, change in adapters[0].changes.items() if len(change.shape) == 2]
    with Operations() as plain:
        _forward(pipe, 6)
    with LiveLayers(components_of(pipe), linear) as live:
        for count in (1, 3):
            weighted = _weighted(*((adapter, 0.5) for adapter in adapters[:count]))
            live.apply({name: weighted[name] for name in linear})
            _forward(pipe, 6)
            with Operations() as operations:
                _forward(pipe, 6)
            assert operations.counts.total() - plain.counts.total() == 2 * len(linear)
        branches = [{name: [(adapter.changes[name], 0.5)] for name in linear} for adapter in adapters]
        live.apply_indexed(branches, rows=[0, 0, 1, 1, 2, 2])
        _forward(pipe, 6)
        with Operations() as operations:
            _forward(pipe, 6)
        assert operations.counts.total() - plain.counts.total() == 2 * len(linear)


def test_other_weights_for_the_same_changes_cost_two_calls_for_the_whole_model(
    pipe: Any, adapters: list[Adapter]
) -> None:
    with _live(pipe, adapters) as live:
        for weight in (0.5, 0.6):
            with Operations() as operations:
                live.apply(_weighted((adapters[0], weight), (adapters[1], 0.1)))
            if weight == 0.6:
                assert operations.counts.total() == 2
            _forward(pipe)
        with Operations() as operations:
            live.apply(_weighted((adapters[0], 0.6), (adapters[1], 0.1)))
        assert not operations.counts


def test_the_weight_is_never_read(adapters: list[Adapter]) -> None:
    class Quantised(torch.nn.Linear):
        """What bitsandbytes' linear layers look like: the weight is stored in another shape and type."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*input.shape[:-1], self.out_features)

    layer = Quantised(6, 4)
    change = KINDS["lora"].sample((4, 6), generator=torch.Generator().manual_seed(0))
    x = _random(2, 3, 6, seed=1)
    for weight in (torch.zeros(12, 1, dtype=torch.uint8), torch.empty(4, 6, device="meta")):
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        with LiveLayers({"unet": layer}, ["unet.weight"]) as live:
            live.apply({"unet.weight": [(change, 0.5)]})
            wanted = x @ change.delta(torch.zeros(4, 6), weight=0.5).t()
            assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_layers_that_are_offloaded_one_by_one(
    short_sd: Callable[[], Any], pipe: Any, adapters: list[Adapter]
) -> None:
    from accelerate import cpu_offload

    changes = _weighted((adapters[0], 0.3), (adapters[2], 0.2))
    offloaded = short_sd()
    cpu_offload(offloaded.unet, torch.device("cpu"))
    assert find_parameter(components_of(offloaded), next(iter(changes))).is_meta
    with _live(offloaded, adapters) as live:
        live.apply(changes)
        assert (_forward(offloaded) - _merged(pipe, changes)).abs().max() < FP32_ERROR
    assert torch.equal(_forward(offloaded), _forward(pipe))


def test_a_weight_that_two_layers_share_is_changed_in_both() -> None:
    pair = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2)).requires_grad_(False)
    pair[1].weight = pair[0].weight
    change = KINDS["lora"].sample((4, 4), generator=torch.Generator().manual_seed(0))
    x = _random(2, 4, seed=1)
    with LiveLayers({"unet": pair}, ["unet.0.weight"]) as live:
        live.apply({"unet.0.weight": [(change, 1.0)]})
        assert torch.equal(pair[0](x), pair[1](x)) and not torch.equal(pair[0](x), x @ pair[0].weight.t())


@pytest.mark.parametrize("kind", list(KINDS))
def test_kinds_without_a_low_rank_form_are_refused_by_name(
    pipe: Any, adapters: list[Adapter], kind: str
) -> None:
    name = next(iter(adapters[0].changes))
    change = KINDS[kind].sample(adapters[0].changes[name].shape, generator=torch.Generator().manual_seed(0))
    changes = {name: [(change, 1.0)]}
    if change.low_rank() is not None:
        assert LiveLayers.why_not(changes) is None
        return
    assert f"'{name}' is of kind '{kind}'" in str(LiveLayers.why_not(changes))
    plain = _forward(pipe)
    with _live(pipe, adapters) as live:
        for apply in (live.apply, lambda one: live.apply_indexed([one], rows=[0, 0])):
            with pytest.raises(
                AdapterError, match=f"'{name}' is of kind '{kind}'.*where weights can be written"
            ):
                apply(changes)
        assert torch.equal(_forward(pipe), plain)


def test_what_does_not_fit_is_refused(pipe: Any, adapters: list[Adapter]) -> None:
    components, name = components_of(pipe), next(iter(adapters[0].changes))
    with pytest.raises(AdapterError, match=r"'unet.conv_in.bias' is not the weight of a linear layer"):
        LiveLayers(components, ["unet.conv_in.bias"])
    with pytest.raises(AdapterError, match=r"no parameter 'unet.conv_inn.weight'.*conv_in"):
        LiveLayers(components, ["unet.conv_inn.weight"])
    wrong = KINDS["lora"].sample((3, 2), generator=torch.Generator())
    with _live(pipe, adapters) as live:
        with pytest.raises(
            AdapterError, match=r"has shape \[3, 2\], the layer .* Load the adapter with base="
        ):
            live.apply({name: [(wrong, 1.0)]})
        with pytest.raises(AdapterError, match="finite"):
            live.apply({name: [(adapters[0].changes[name], float("nan"))]})
        with pytest.raises(AdapterError, match=r"'unet.conv_in.weight' is none of the live layers"):
            live.apply({"unet.conv_in.weight": []})
        with pytest.raises(ValueError, match=r"rows must name branches 0 to 0"):
            live.apply_indexed([{}], rows=[1])
        live.apply_indexed([_weighted((adapters[0], 1.0))], rows=[0, 0, -1])
        with pytest.raises(AdapterError, match=r"has 2 rows, apply_indexed\(\) was told 3"):
            _forward(pipe)
