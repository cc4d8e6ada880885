"""The sparse AdamW step against torch.optim.AdamW, bit for bit, and against the formula in fp64."""

import math
from collections.abc import Callable

import pytest
import torch

from studio.kernels import sparse_adamw as module
from studio.kernels.entries import places
from studio.kernels.sparse_adamw import SparsePlan, gather, scatter_, sparse_adamw_

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
# Tensors of every kind of strides; the last four leave gaps or differ from row-major order.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda source: source[0],
    "vector": lambda source: source[:63],
    "matrix": lambda source: source[:341].view(31, 11),
    "offset": lambda source: source[100:441].view(11, 31),
    "transposed": lambda source: source[:341].view(31, 11).t(),
    "channels-last": lambda source: source[:360].view(5, 3, 3, 8).permute(0, 3, 1, 2),
    "sliced": lambda source: source[:800].view(20, 40)[3::2, 1:38:3],
    "5-axes": lambda source: source[:720].view(6, 5, 4, 3, 2).permute(4, 2, 0, 3, 1)[::2],
}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=_generator(seed))


def _chosen(numel: int, seed: int = 0) -> torch.Tensor:
    """About two thirds of the positions, ascending."""
    count = max(1, 2 * numel // 3)
    return torch.randperm(numel, generator=_generator(seed))[:count].sort().values.int()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()])


def _state(size: int, seed: int = 0) -> list[torch.Tensor]:
    """Values, gradients and both moments of some later step."""
    values, grads, first = (_random(size, seed + number) for number in range(3))
    return [values, grads, first * 0.1, _random(size, seed + 3).square() * 0.01]


def _formula(
    state: list[torch.Tensor], *, step: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> list[torch.Tensor]:
    """Loshchilov and Hutter's step on numbers of double precision, one entry at a time."""
    rows = []
    for theta, g, m, v in zip(*(vector.double().tolist() for vector in state), strict=True):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        rows.append((theta - lr * decay * theta - lr * m_hat / (math.sqrt(v_hat) + eps), m, v))
    return list(torch.tensor(rows, dtype=torch.float64).unbind(1))


@pytest.mark.parametrize("size", [1, 63, 341, module.CHUNK + 5])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "decay"),
    [(1e-3, (0.9, 0.999), 1e-8, 1e-2), (5e-2, (0.3, 0.95), 1e-6, 0.0), (1e-4, (0.0, 0.0), 1e-8, 0.5)],
    ids=["defaults", "no-decay", "no-memory"],
)
def test_values_and_moments_are_those_of_torch_bit_for_bit(
    size: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    theirs = torch.nn.Parameter(_random(size, 0))
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
    optimizer = torch.optim.AdamW([theirs], foreach=False, **settings)
    values, first, second = theirs.detach().clone(), torch.zeros(size), torch.zeros(size)
    weight, positions = torch.zeros(3 * size), torch.arange(0, 3 * size, 3, dtype=torch.int32)
    for step in range(1, 8):
        grads = _random(size, step) * 10.0 ** (2 - step)
        theirs.grad = grads.clone()
        optimizer.step()
        sparse_adamw_([weight], [positions], values, grads, first, second, step=step, **settings)
        assert torch.equal(grads, theirs.grad)
    state = optimizer.state[theirs]
    assert torch.equal(values, theirs.detach())
    assert torch.equal(first, state["exp_avg"]) and torch.equal(second, state["exp_avg_sq"])
    assert torch.equal(weight[::3], values)


def test_chosen_entries_go_where_adamw_takes_them_in_the_dense_weight() -> None:
    dense = torch.nn.Parameter(_random(341, 0).view(31, 11))
    weight, positions = dense.detach().clone(), _chosen(341)
    before = weight.clone()
    values = gather(weight, positions)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    optimizer = torch.optim.AdamW([dense], lr=1e-2, foreach=False)
    plan = SparsePlan([weight], [positions])
    for step in range(1, 6):
        dense.grad = _random(341, step).view(31, 11)
        optimizer.step()
        plan.adamw_(values, gather(dense.grad, positions), first, second, step=step, lr=1e-2)
    chosen = torch.zeros(341, dtype=torch.bool).index_fill_(0, positions.long(), True).view(31, 11)
    # A unit in the last place: torch's vector and remainder loops may round differently.
    torch.testing.assert_close(weight[chosen], dense.detach()[chosen], rtol=1.2e-7, atol=1.2e-7)
    assert torch.equal(weight[~chosen], before[~chosen])


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_step_is_the_formula(step: int) -> None:
    settings = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    state = _state(341)
    wanted = _formula(state, step=step, decay=0.1, **settings)
    weight = torch.zeros(341)
    sparse_adamw_(
        [weight], [torch.arange(341, dtype=torch.int32)], *state, step=step, weight_decay=0.1, **settings
    )
    for got, exact in zip([state[0], state[2], state[3]], wanted, strict=True):
        # Some units in the last place of fp32: each of about eight operations rounds once.
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_writes_the_rounded_values_and_no_other_bit(layout: str, dtype: str) -> None:
    memory = _random(1000, 0).to(DTYPES[dtype])
    memory[::7] = math.nan
    before = memory.clone()
    weight = LAYOUTS[layout](memory)
    positions = _chosen(weight.numel())
    values, grads, first, second = _state(positions.numel())
    sparse_adamw_([weight], [positions], values, grads, first, second, step=3, lr=1e-2)

    wanted = before.clone()
    # Where each position lies, from a tensor of the same strides that holds its own addresses.
    addresses = LAYOUTS[layout](torch.arange(1000)).flatten()[positions.long()]
    wanted[addresses] = values.to(DTYPES[dtype])
    assert torch.equal(_bits(memory), _bits(wanted))


@pytest.mark.parametrize("dtype", [*DTYPES, "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_reads_entries_in_row_major_order(layout: str, dtype: str) -> None:
    dense = LAYOUTS[layout](_random(1000, 0).to(DTYPES.get(dtype, torch.float8_e4m3fn)))
    positions = _chosen(dense.numel())
    wanted = dense.float().flatten()[positions.long()]
    assert torch.equal(gather(dense, positions), wanted)
    out = torch.full_like(wanted, math.nan)
    assert gather(dense, positions, out=out) is out and torch.equal(out, wanted)
    out.fill_(2.0)
    gather(dense, positions, out=out, accumulate=True)
    assert torch.equal(out, wanted + 2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter_undoes_what_was_written_over_gathered_entries(layout: str) -> None:
    memory = _random(1000, 0).bfloat16()
    before, dense = memory.clone(), LAYOUTS[layout](memory)
    positions = _chosen(dense.numel())
    pristine = gather(dense, positions)
    scatter_(dense, positions, torch.full_like(pristine, 9.0))
    assert int((memory == 9).sum()) == positions.numel()
    scatter_(dense, positions, pristine)
    assert torch.equal(memory, before)


def test_gather_takes_positions_in_any_order_and_scatter_too() -> None:
    dense = _random(10, 0)
    positions = torch.tensor([7, 0, 3], dtype=torch.int32)
    assert torch.equal(gather(dense, positions), dense[[7, 0, 3]])
    scatter_(dense, positions, torch.tensor([1.0, 2.0, 3.0]))
    assert dense[[7, 0, 3]].tolist() == [1, 2, 3]


def test_gather_reads_an_expanded_tensor() -> None:
    dense = _random(4, 0).expand(3, 4)
    assert torch.equal(gather(dense, torch.arange(12, dtype=torch.int32)), dense.flatten())


def test_strides_are_multiplied_in_64_bits() -> None:
    dense = torch.empty_strided((3, 2, 2), (2**35, 2**32, 5), device="meta")
    positions = torch.tensor([0, 3, 10], dtype=torch.int32)
    assert places(dense, positions).tolist() == [0, 2**32 + 5, 2**36 + 2**32]


def test_segments_follow_one_another_and_may_be_empty() -> None:
    weights = [torch.zeros(5), torch.zeros(4), torch.zeros(()), torch.zeros(0, 3)]
    lists = [[0, 4], [], [0], []]
    indices = [torch.tensor(numbers, dtype=torch.int32) for numbers in lists]
    values = torch.tensor([1.0, 2.0, 3.0])
    still = torch.zeros(3)
    sparse_adamw_(weights, indices, values, still, still.clone(), still.clone(), step=1, lr=0.0)
    assert [weight.flatten().tolist() for weight in weights] == [[1, 0, 0, 0, 2], [0] * 4, [3], []]


@pytest.mark.parametrize("weights", [[], [torch.ones(3)]], ids=["no-weights", "no-entries"])
def test_a_plan_without_entries_does_nothing(weights: list[torch.Tensor]) -> None:
    empty = [torch.zeros(0) for _ in range(4)]
    indices = [torch.zeros(0, dtype=torch.int32) for _ in weights]
    sparse_adamw_(weights, indices, *empty, step=1, lr=1.0)
    assert all(bool((weight == 1).all()) for weight in weights)


@pytest.mark.parametrize("chunk", [1, 7, 341])
def test_the_size_of_chunks_changes_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (module.CHUNK, chunk):
        monkeypatch.setattr(module, "CHUNK", size)
        weight = LAYOUTS["channels-last"](_random(1000, 0).half())
        positions = _chosen(weight.numel())
        state = _state(positions.numel())
        sparse_adamw_([weight], [positions], *state, step=2, lr=1e-2)
        results.append([weight, *state, gather(weight, positions)])
    assert all(torch.equal(whole, parts) for whole, parts in zip(*results, strict=True))


def test_changes_below_the_last_place_of_a_16_bit_weight_add_up() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16)
    plan = SparsePlan([weight], [torch.zeros(1, dtype=torch.int32)])
    values, first, second = torch.ones(1), torch.zeros(1), torch.zeros(1)
    # Steps of 0.0005, an eighth of bf16's unit below 1.
    for step in range(1, 101):
        plan.adamw_(values, torch.ones(1), first, second, step=step, lr=5e-4, weight_decay=0.0)
    assert weight.item() == pytest.approx(0.95, abs=2.0**-9)  # Half of bf16's unit there.


def test_a_plan_follows_data_that_was_replaced() -> None:
    weight = torch.nn.Parameter(_random(360, 0).view(5, 8, 3, 3))
    positions = _chosen(360)
    plan = SparsePlan([weight], [positions])
    for change in (lambda w: w.to(memory_format=torch.channels_last), lambda w: w.half(), torch.clone):
        weight.data = change(weight.data)
        state = _state(positions.numel())
        plan.adamw_(*state, step=1, lr=1e-2)
        assert torch.equal(gather(weight, positions), state[0].to(weight.dtype).float())


def test_parameters_and_values_that_require_gradients_are_written_to() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    values = torch.nn.Parameter(torch.ones(3))
    positions = torch.arange(3, dtype=torch.int32)
    sparse_adamw_(
        [weight], [positions], values, torch.ones(3), torch.zeros(3), torch.zeros(3), step=1, lr=0.1
    )
    assert torch.equal(weight, values) and weight.requires_grad and weight.is_leaf


def test_entries_that_were_not_chosen_keep_their_bits_over_a_thousand_random_steps() -> None:
    generator = _generator(7)
    memories = [_random(1000, seed).to(dtype) for seed, dtype in enumerate(DTYPES.values())]
    memories[0][5], memories[1][5] = -0.0, math.nan
    before = [memory.clone() for memory in memories]
    names = ["channels-last", "sliced", "vector", "transposed"]
    weights = [LAYOUTS[name](memory) for name, memory in zip(names, memories, strict=True)]
    indices = [_chosen(weight.numel(), seed) for seed, weight in enumerate(weights)]
    plan = SparsePlan(weights, indices)
    values = torch.cat([gather(*pair) for pair in zip(weights, indices, strict=True)]).nan_to_num()
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, 1001):
        scale, lr = (10 ** (4 * torch.rand(2, generator=generator) - 4)).tolist()
        grads = scale * torch.randn(values.shape, generator=generator)
        plan.adamw_(values, grads, first, second, step=step, lr=lr)
    assert bool(values.isfinite().all())
    for name, memory, old, positions in zip(names, memories, before, indices, strict=True):
        chosen = torch.zeros(1000, dtype=torch.bool)
        chosen[LAYOUTS[name](torch.arange(1000)).flatten()[positions.long()]] = True
        assert torch.equal(_bits(memory)[~chosen], _bits(old)[~chosen])
        assert not torch.equal(memory[chosen], old[chosen])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_temporaries_are_bounded_however_many_entries_there_are(layout: str) -> None:
    weight = torch.zeros(64, 128, 8, 16).half()
    if layout == "channels-last":
        weight = weight.to(memory_format=torch.channels_last)
    positions = torch.arange(weight.numel(), dtype=torch.int32)
    state = _state(weight.numel())
    plan = SparsePlan([weight], [positions])
    with torch.profiler.profile(profile_memory=True) as profile:
        plan.adamw_(*state, step=1, lr=1e-3)
        gather(weight, positions, out=state[0], accumulate=True)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert 0 < most <= 4 * 2**20 < 4 * weight.numel() * 2
