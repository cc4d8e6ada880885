"""Each merging algorithm against its formula in fp64, or against peft where peft computes the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from studio.adapters.adapter import Adapter
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.merge import Merged

Make = Callable[..., Adapter]
Run = Callable[..., Merged]
Full = Callable[..., Tensor]
LINEAR = "unet.mid_block.attentions.0.proj_in.weight"
KERNEL = "unet.up_blocks.0.resnets.0.conv1.weight"
WEIGHTS = {"a": 0.8, "b": -1.3, "c": 0.5}
# fp32 factors against fp64, numbers of about 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def three(lora: Make) -> dict[str, Adapter]:
    return {name: lora(seed, rank=seed + 1) for seed, name in enumerate(WEIGHTS, start=1)}


@pytest.mark.parametrize("name", [LINEAR, KERNEL], ids=["linear", "kernel"])
def test_linear_is_the_weighted_sum_and_its_ranks_add_up(
    merged: Run, three: dict[str, Adapter], full: Full, name: str
) -> None:
    got = merged("linear", three, WEIGHTS)
    wanted = sum(full(adapter, name, WEIGHTS[key]) for key, adapter in three.items())
    torch.testing.assert_close(full(got, name), wanted, **CLOSE)
    assert got.layers[name].rank == 2 + 3 + 4 and got.layers[name].ranks == (2, 3, 4)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("name", [LINEAR, KERNEL], ids=["linear", "kernel"])
def test_svd_is_the_nearest_product_of_its_rank_and_says_how_near(
    merged: Run, three: dict[str, Adapter], full: Full, name: str, rank: int
) -> None:
    got = merged("svd", three, WEIGHTS, rank=rank)
    target = sum(full(adapter, name, WEIGHTS[key]) for key, adapter in three.items())
    rows, values, columns = np.linalg.svd(target.flatten(1).numpy(), full_matrices=False)
    nearest = (rows[:, :rank] * values[:rank]) @ columns[:rank]
    np.testing.assert_allclose(full(got, name).flatten(1), nearest, atol=1e-5)  # fp32 factors.
    layer = got.layers[name]
    assert layer.error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-6)
    assert layer.size == pytest.approx(np.linalg.norm(values)) and layer.rank == rank
    np.testing.assert_allclose(layer.values[:9], values[:9], rtol=1e-6)  # The input is fp32.
    change = got.adapter.changes[name]
    lengths = change.up.flatten(1).norm(dim=0), change.down.flatten(1).norm(dim=1)
    torch.testing.assert_close(*lengths, **CLOSE)  # Both factors have the same part of it.


def test_soup_is_the_mean_of_the_models(merged: Run, three: dict[str, Adapter], full: Full) -> None:
    base = torch.randn(24, 40, dtype=torch.float64)
    models = torch.stack([base + full(adapter) for adapter in three.values()])
    got = merged("soup", three, dict.fromkeys(three, 0.7))
    torch.testing.assert_close(base + full(got), models.mean(0), **CLOSE)
    weighted = merged("soup", three, {"a": 3.0, "b": 1.0, "c": 0.0})
    torch.testing.assert_close(base + full(weighted), 0.75 * models[0] + 0.25 * models[1], **CLOSE)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("how", ["ties", "magnitude"])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_magnitude_are_those_of_peft(
    merged: Run, three: dict[str, Adapter], full: Full, how: str, density: float
) -> None:
    # peft lets every adapter vote at weight 1, so the weights are in what it is given.
    deltas = [full(adapter, LINEAR, WEIGHTS[key]).float() for key, adapter in three.items()]
    oracle = merge_utils.ties if how == "ties" else merge_utils.magnitude_prune
    wanted = oracle(deltas, torch.ones(3), density)
    got = merged(how, three, WEIGHTS, density=density, dense=True)
    torch.testing.assert_close(full(got), wanted.double(), **CLOSE)


def test_dare_drops_at_random_and_scales_up_what_it_keeps(
    merged: Run, three: dict[str, Adapter], full: Full
) -> None:
    alone = {
        key: full(merged("dare", {key: adapter}, {key: WEIGHTS[key]}, density=0.3, dense=True))
        for key, adapter in three.items()
    }
    for key, adapter in three.items():
        kept = alone[key] != 0
        assert float(kept.double().mean()) == pytest.approx(0.3, abs=0.06)  # 4 deviations of 960 draws.
        wanted = full(adapter, LINEAR, WEIGHTS[key]) / 0.3
        torch.testing.assert_close(alone[key][kept], wanted[kept], **CLOSE)
    stacked = torch.stack(list(alone.values()))
    total = merged("dare", three, WEIGHTS, density=0.3, dense=True)
    torch.testing.assert_close(full(total), stacked.sum(0), **CLOSE)
    signs = merge_utils.calculate_majority_sign_mask(stacked)
    ties = merged("dare", three, WEIGHTS, density=0.3, dense=True, combine="ties")
    torch.testing.assert_close(full(ties), merge_utils.disjoint_merge(stacked, signs), **CLOSE)


def test_dare_is_right_in_the_mean(merged: Run, lora: Make, full: Full) -> None:
    adapter = lora(1)
    draws = [
        full(merged("dare", {"a": adapter}, {"a": 1.0}, density=0.5, dense=True, merge_seed=seed))
        for seed in range(60)
    ]
    mean, wanted = torch.stack(draws).mean(0), full(adapter)
    # At density 1/2 a draw is off by its own size, the mean of 60 by an eighth of it.
    assert float((mean - wanted).norm() / wanted.norm()) == pytest.approx(60**-0.5, rel=0.1)


def _pcb(deltas: list[np.ndarray], density: float) -> np.ndarray:
    """Return PCB-Merging of flat changes: arXiv:2410.02396, Sec. 3."""

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    above, below = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta in deltas:
        balance = softmax(len(deltas) * norm(delta * delta)) * sum(
            softmax(norm(delta * other)) for other in deltas
        )
        balance[balance < np.sort(balance)[-int(density * balance.size)]] = 0
        above, below = above + balance * delta, below + balance
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_pcb_is_its_formula(merged: Run, three: dict[str, Adapter], full: Full, density: float) -> None:
    deltas = [full(adapter, LINEAR, WEIGHTS[key]).numpy().ravel() for key, adapter in three.items()]
    got = merged("pcb", three, WEIGHTS, density=density, dense=True)
    np.testing.assert_allclose(full(got).ravel(), _pcb(deltas, density), rtol=1e-4, atol=1e-5)  # fp32.


def _rank_ones(vectors: list[tuple[np.ndarray, np.ndarray]], *, stretch: float = 1.0) -> Adapter:
    up = torch.tensor(np.stack([b for b, _ in vectors], 1) * stretch).float()
    down = torch.tensor(np.stack([a for _, a in vectors]) / stretch).float()
    return Adapter("units", "lora", {LINEAR: LoraChange(down, up, float(len(vectors)))})


def _orthogonal(count: int, size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))[0].T


def test_lego_makes_one_unit_of_each_cluster_and_reweights_it(merged: Run, full: Full) -> None:
    left, right = _orthogonal(4, 24, 0), _orthogonal(4, 40, 1)
    # Two themes in three adapters: u, and u leaning a little elsewhere, and -u written with other lengths.
    themes = [(3.0 * left[0], 3.0 * right[0]), (2.0 * left[1], 2.0 * right[1])]
    turned = [((b + 0.3 * left[2 + i]), (a + 0.3 * right[2 + i])) for i, (b, a) in enumerate(themes)]
    negated = [(-b, -a) for b, a in reversed(themes)]
    adapters = {"a": _rank_ones(themes), "b": _rank_ones(turned), "c": _rank_ones(negated, stretch=7.0)}
    wanted = np.zeros((24, 40))
    for theme, other in zip(themes, turned, strict=True):
        units = [np.concatenate(unit) for unit in (theme, other, theme)]
        # A unit of the SVD has b and a of equal length.
        b, a = other
        even = (np.linalg.norm(a) / np.linalg.norm(b)) ** 0.5
        units[1] = np.concatenate([b * even, a / even])
        centre = np.mean(units, 0)
        centre *= np.mean([np.linalg.norm(unit) for unit in units]) / np.linalg.norm(centre)
        wanted += np.outer(centre[:24], centre[24:])
    got = merged("lego", adapters, dict.fromkeys(adapters, 1.0), rank=2)
    np.testing.assert_allclose(full(got), wanted, atol=1e-5)  # fp32; r = k = 2, so no output reweighting.


def test_lego_of_unlike_adapters_has_the_output_of_one(merged: Run, full: Full) -> None:
    left, right = _orthogonal(4, 24, 2), _orthogonal(4, 40, 3)
    halves = [_rank_ones([(left[i], right[i]), (left[i + 1], 3 * right[i + 1])]) for i in (0, 2)]
    got = merged("lego", dict(zip("ab", halves, strict=True)), {"a": 1.0, "b": 1.0}, rank=4)
    wanted = (full(halves[0]) + full(halves[1])) * (2 / 4) ** 0.5
    torch.testing.assert_close(full(got), wanted, **CLOSE)
    assert float(full(got).norm()) == pytest.approx(float(full(halves[0]).norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_lego_finds_clusters_about_as_good_as_the_best_of_many_tries(
    rank: int,
) -> None:
    from studio.adapters.merging.lego import _clusters, _distances

    units = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    costs = []
    for seed in range(30):
        labels, centres = _clusters(units, rank, torch.Generator().manual_seed(seed))
        assert labels.unique().numel() == rank
        nearest = _distances(units, centres)
        assert torch.equal(nearest.argmin(1), labels)  # Converged: nobody would rather be elsewhere.
        costs.append(float(nearest.amin(1).sum()))
    assert float(np.median(costs)) < 1.3 * min(costs)


class _Widest(TorchDispatchMode):
    """Remembers the most entries that any result had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.most = max(self.most, part.numel())
        return result


@pytest.mark.parametrize("how", ["linear", "soup", "svd", "lego"])
def test_low_rank_changes_are_never_multiplied_out(merged: Run, lora: Make, how: str) -> None:
    side, ranks = 2048, (4, 6)
    adapters = {str(rank): lora(rank, rank=rank, shapes={LINEAR: (side, side)}) for rank in ranks}
    with _Widest() as widest:
        merged(how, adapters, dict.fromkeys(adapters, 0.5), spectra=True)
    # Both sides of all units side by side (lego), out of 4 194 304 entries.
    assert 0 < widest.most <= 2 * side * sum(ranks)
