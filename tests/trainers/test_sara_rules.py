"""SaRA's rules: the rank term, how many entries it selects, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sara_oracle import batch_loss, trainer_on
from torch import nn

from studio.errors import SpecError, TrainingError
from studio.specs import TrainSpec, parse_spec
from studio.trainers.nuclear_norm import nuclear_norm_gradient
from studio.trainers.selection import Selection

Base = Callable[[], Any]
GIVEN = {"data": "d", "output": "o.safetensors", "method": "sara"}


@pytest.mark.parametrize("shape", [(40, 40), (33, 70), (70, 33)], ids=str)
def test_the_nuclear_norms_gradient_is_autograds(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    exact = matrix.double().requires_grad_()
    torch.linalg.matrix_norm(exact, "nuc").backward()
    assert exact.grad is not None
    assert torch.allclose(nuclear_norm_gradient(matrix).double(), exact.grad, atol=1e-4)  # fp32 SVD
    assert torch.equal(nuclear_norm_gradient(torch.zeros(shape)), torch.zeros(shape))
    thin = matrix[:, :3] @ matrix[:3, :]
    assert float(nuclear_norm_gradient(thin).square().sum()) == pytest.approx(3, rel=1e-3)  # rank 3, fp32


def with_values(shape: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """Return a matrix ``[m, n]``, fp32, with these singular values ``[r]`` and zeros."""
    generator = torch.Generator().manual_seed(2)
    sides = [torch.randn(side, len(values), generator=generator, dtype=torch.float64) for side in shape]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return ((left * values) @ right.T).float()


# 5000 columns are several blocks.
@pytest.mark.parametrize("shape", [(48, 48), (70, 33), (33, 5000)], ids=str)
@pytest.mark.parametrize("rank", [33, 3])
def test_the_nuclear_norms_gradient_is_that_of_the_decomposition(shape: tuple[int, int], rank: int) -> None:
    # From the largest to the smallest are three decades, six where squared: more than fp32 could tell apart.
    matrix = with_values(shape, torch.logspace(0, -3, rank, dtype=torch.float64))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    exact = left[:, :rank] @ right[:rank]
    # fp32 rounds 1e-7 of the largest singular value, which is 1e-4 of the smallest.
    assert float((nuclear_norm_gradient(matrix).double() - exact).norm()) < 1e-4 * float(exact.norm())


def test_tables_of_tokens_take_no_turns(tiny_sd: Base) -> None:
    trainer, parts, _ = trainer_on(tiny_sd(), quantile=0.5, rank_weight=1.0, train_text_encoder=True)
    term = trainer._rank_term
    assert term is not None
    names = {part.names[number] for part, number in term._matrices}
    tables = {name for part in parts for name in part.names if "token_embedding" in name}
    assert tables and not tables & names
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    assert any("time_embedding.linear" in name for name in names)


@pytest.mark.parametrize("of", ["parameter", "delta"])
def test_the_rank_term_adds_the_masked_gradient_of_one_matrix(tiny_sd: Base, of: str) -> None:
    pipe = tiny_sd()
    base = {f"unet.{name}": weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    trainer, (part,), optimizer = trainer_on(
        pipe, quantile=0.5, rank_weight=0.25, rank_term_on=of, rank_every=2
    )
    batch_loss(pipe, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    batch_loss(pipe, 2).backward()
    assert part.values.grad is not None
    seen = set()
    for step in range(1, 40):
        part.values.grad.zero_()
        trainer.before_clipping(step)
        touched = [i for i, place in enumerate(part.plan.segments) if part.values.grad[place].any()]
        if step % 2 == 0:
            assert not touched
            continue
        (number,) = touched
        seen.add(number)
        weight, indices = part.plan.weights[number].detach(), part.plan.indices[number].long()
        dense = torch.zeros(weight.numel(), dtype=torch.float64)
        start = base[part.names[number]].flatten()[indices].double() if of == "delta" else 0.0
        dense[indices] = weight.flatten()[indices].double() - start
        exact = dense.view(weight.shape[0], -1).requires_grad_()
        torch.linalg.matrix_norm(exact, "nuc").backward()
        assert exact.grad is not None
        expected = 0.25 * exact.grad.flatten()[indices]
        got = part.values.grad[part.plan.segments[number]].double()
        assert torch.allclose(got, expected, atol=2e-3 * float(expected.abs().max()))  # fp32 SVD
    shapes = {part.plan.weights[number].ndim for number in seen}
    assert len(seen) > 10 and shapes == {2, 4}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threshold": 0.1, "quantile": 0.1}, r"quantile: threshold says the same.*Give one of the two"),
        ({"quantile": 0}, r"quantile: .*greater than 0, got 0"),
        ({"quantile": 1.5}, r"quantile: .*less than or equal to 1, got 1\.5"),
        ({"selection": "random", "reselect_at": 3}, r"reselect_at: a random selection does not change"),
        ({"selection": "smalest"}, r"selection: .*'smallest', 'largest' or 'random'"),
    ],
    ids=["both", "nothing", "too-much", "random-reselect", "unknown"],
)
def test_options_that_do_not_fit_are_refused_by_the_specification(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_spec(TrainSpec, GIVEN | values)


def test_a_rank_term_without_matrices_is_refused() -> None:
    from diffusers import UNet2DConditionModel

    pipe: Any = type("Pipe", (), {"components": {}})()
    pipe.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    ).requires_grad_(False)  # fmt: skip
    del pipe.unet.down_blocks, pipe.unet.up_blocks, pipe.unet.mid_block, pipe.unet.time_embedding
    with pytest.raises(TrainingError, match=r"no selected weight has two sides of 32.*Set rank_weight to 0"):
        trainer_on(pipe, quantile=0.5, rank_weight=1.0)


def test_reselection_that_leaves_nothing_says_so(tiny_sd: Base) -> None:
    trainer, (part,), _ = trainer_on(tiny_sd(), quantile=0.1, reselect_at=1)
    part.values.detach().fill_(100.0)
    with pytest.raises(
        TrainingError, match=r"after step 1 no entry would be selected any more.*reselect_at to 0"
    ):
        trainer.before_clipping(2)


def test_pipelines_with_layers_of_peft_are_refused(tiny_sd: Base) -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(TrainingError, match=r"peft adapters loaded\. Call pipe\.unload_lora_weights"):
        trainer_on(pipe)


@pytest.mark.parametrize(("family", "size"), [("sd1", 859_520_964), ("sdxl", 2_567_463_684)])
def test_full_size_models_are_selected_from_as_the_quantile_says(
    full_size_unet: Callable[[str], nn.Module], family: str, size: int
) -> None:
    unet = full_size_unet(family)
    weights = list(unet.parameters())
    assert sum(weight.numel() for weight in weights) == size
    rule = Selection("smallest", None, 0.06)
    chosen = sum(rule.count(weight) for weight in weights)
    # The paper's 50 M of SD 1.5, which its threshold of 0.002 selects, are 6 %; 20 bytes each on the device.
    assert abs(chosen - 0.06 * size) <= len(weights) / 2
    assert family != "sd1" or 50e6 < chosen < 53e6
    assert all(weight.is_meta for weight in weights)
