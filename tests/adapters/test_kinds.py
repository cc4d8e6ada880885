"""What every registered kind of change promises, and LoRA's own rules."""

import pytest
import torch

from studio.adapters.adapter import Change
from studio.adapters.kinds.lora import LoraChange
from studio.kernels.merge_bank import merge_bank
from studio.registry import KINDS

SHAPES = [(7, 5), (6, 5, 3, 3), (6, 5, 1, 1), (1, 1)]


def _sample(kind: str, shape: tuple[int, ...]) -> tuple[Change, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return KINDS[kind].sample(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_delta_has_the_bases_shape_in_fp32_and_leaves_the_base_alone(
    kind: str, shape: tuple[int, ...]
) -> None:
    change, base = _sample(kind, shape)
    before = base.clone()
    delta = change.delta(base.half(), weight=0.7)
    assert isinstance(change, Change) and change.shape == shape
    assert delta.shape == shape and delta.dtype == torch.float32 and bool(delta.any())
    assert torch.equal(base, before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weight_zero_is_no_change(kind: str) -> None:
    change, base = _sample(kind, (7, 5))
    assert not change.delta(base, weight=0.0).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_low_rank_pair_and_delta_are_one_change(kind: str, shape: tuple[int, ...]) -> None:
    change, base = _sample(kind, shape)
    pair = change.low_rank()
    if pair is None:
        pytest.skip(f"{kind} has no low-rank form")
    merged = merge_bank(base, [pair], [0.7])
    assert torch.allclose(
        merged, base + change.delta(base, weight=0.7), atol=1e-5
    )  # Two orders of fp32 operations.


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_change_survives_its_parts_at_any_alpha(kind: str, shape: tuple[int, ...], alpha: float) -> None:
    change, base = _sample(kind, shape)
    parts = change.to_parts(alpha=alpha)
    assert KINDS[kind].required <= parts.keys() <= KINDS[kind].required | KINDS[kind].optional
    (again,) = KINDS[kind].from_parts(parts).values()
    assert torch.allclose(
        again.delta(base, weight=1.0), change.delta(base, weight=1.0), atol=1e-5
    )  # fp32 rounding.


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)], ids=["linear", "conv"])
def test_lora_is_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(4, *shape[1:], generator=generator)
    up = torch.randn(6, 4, *(1 for _ in shape[2:]), generator=generator)
    change = LoraChange(down, up, alpha=3.0)
    wanted = torch.einsum("or,r...->o...", up.double().flatten(1), down.double()) * (3.0 / 4) * 0.6
    assert torch.allclose(
        change.delta(torch.zeros(shape), weight=0.6).double(), wanted, atol=1e-5
    )  # fp32 sums.


@pytest.mark.parametrize(
    ("ours", "asked"), [((6, 5), (6, 5, 1, 1)), ((6, 5, 1, 1), (6, 5))], ids=["conv", "linear"]
)
def test_linear_layers_and_pointwise_convolutions_stand_for_each_other(
    ours: tuple[int, ...], asked: tuple[int, ...]
) -> None:
    change, base = _sample("lora", ours)
    fitted = change.fitted(asked)
    assert fitted is not None and fitted.shape == asked
    assert torch.equal(
        fitted.delta(base.reshape(asked), weight=1.0).flatten(), change.delta(base, weight=1.0).flatten()
    )


@pytest.mark.parametrize("asked", [(5, 6), (6, 5, 3, 3), (6,), (), (6, 5, 1)])
def test_lora_fits_no_other_shape(asked: tuple[int, ...]) -> None:
    assert _sample("lora", (6, 5))[0].fitted(asked) is None


@pytest.mark.parametrize(
    ("down", "up", "alpha", "words"),
    [
        (
            torch.zeros(4, 5),
            torch.zeros(6, 3),
            None,
            r"lora_down \[4, 5\] and lora_up \[6, 3\] differ in rank, 4 and 3",
        ),
        (torch.zeros(4, 5), torch.zeros(6, 4, 1, 1), None, "neither a linear layer nor a convolution"),
        (torch.zeros(4, 5, 1, 1), torch.zeros(6, 4, 3, 3), None, "neither a linear layer nor a convolution"),
        (torch.zeros(4), torch.zeros(4), None, "neither a linear layer nor a convolution"),
        (torch.zeros(0, 5), torch.zeros(6, 0), None, "are empty"),
        (torch.zeros(4, 5, dtype=torch.int8), torch.zeros(6, 4), None, "floating types were expected"),
        (torch.zeros(4, 5), torch.zeros(6, 4), torch.zeros(2), r"alpha has shape \[2\]"),
        (torch.zeros(4, 5), torch.zeros(6, 4), torch.zeros(()), "alpha is 0"),
    ],
    ids=["rank", "axes", "up-kernel", "vector", "empty", "integer", "alpha-shape", "alpha-zero"],
)
def test_factors_that_make_no_lora_are_refused(
    down: torch.Tensor, up: torch.Tensor, alpha: torch.Tensor | None, words: str
) -> None:
    parts = {"lora_down.weight": down, "lora_up.weight": up} | ({} if alpha is None else {"alpha": alpha})
    with pytest.raises(ValueError, match=words):
        LoraChange.from_parts(parts)


def test_missing_alpha_means_the_rank() -> None:
    change = LoraChange.from_parts(
        {"lora_down.weight": torch.ones(4, 5), "lora_up.weight": torch.ones(6, 4)}
    )["weight"]
    assert change.alpha == change.rank == 4
