"""SaRA against the same problem solved densely, and what it costs."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sara_oracle import DenseProblem, batch_loss, masks_of, smallest, trainer_on
from torch import Tensor, nn

from studio.trainers.base import ParameterGroup
from studio.trainers.optimizers import make_optimizer

Base = Callable[[], Any]
BASES = ["sd", "sdxl"]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tiny_sd: Base, tiny_sdxl: Base) -> Base:
    """Return a factory of one of the two architectures."""
    return tiny_sd if request.param == "sd" else tiny_sdxl


def weights(pipe: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}


def do_step(trainer: Any, pipe: Any, optimizer: Any, number: int, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        (batch_loss(pipe, seed) / len(seeds)).backward()
    trainer.before_clipping(number)
    optimizer.step()
    optimizer.zero_grad()
    trainer.after_step(number)


def masked_gradient(pipe: Any, seeds: tuple[int, ...], share: float) -> Tensor:
    """Return what autograd gives for all weights, and of that the chosen entries."""
    dense = DenseProblem(pipe, masks_of(pipe, smallest(share)), rate=0.0)
    for seed in seeds:
        batch_loss(dense.pipe, seed).backward()
    gradients = {name: weight.grad for name, weight in dense.weights.items()}
    return torch.cat([gradients[name][mask] for name, mask in dense.masks.items()])  # type: ignore[index]


def test_before_training_the_forward_pass_is_the_bases(base: Base) -> None:
    pipe = base()
    plain = batch_loss(pipe, 1).detach()
    trainer_on(pipe, quantile=0.3)
    assert torch.equal(batch_loss(pipe, 1).detach(), plain)


def test_the_gradient_is_the_dense_one_at_the_chosen_entries(base: Base) -> None:
    pipe = base()
    expected = masked_gradient(pipe, (1,), 0.2)
    _, (part,), _ = trainer_on(pipe, quantile=0.2)
    batch_loss(pipe, 1).backward()
    assert part.values.grad is not None and torch.equal(part.values.grad, expected)
    assert expected.abs().max() > 1e-4


def test_backward_passes_add_up(base: Base) -> None:
    pipe = base()
    expected = masked_gradient(pipe, (1, 2), 0.2)
    _, (part,), _ = trainer_on(pipe, quantile=0.2)
    for seed in (1, 2):
        batch_loss(pipe, seed).backward()
    assert part.values.grad is not None
    assert torch.allclose(part.values.grad, expected, rtol=0, atol=1e-6)  # fp32 sums in another order


def test_checkpointing_changes_no_gradient(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls = base(), []
    expected = masked_gradient(pipe, (1,), 0.2)
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    _, (part,), _ = trainer_on(pipe, quantile=0.2)
    batch_loss(pipe, 1).backward()
    assert calls and part.values.grad is not None
    assert torch.allclose(part.values.grad, expected, rtol=0, atol=1e-6)  # fp32 sums in another order


def test_accumulating_two_samples_equals_a_batch_of_both(base: Base) -> None:
    together, apart = base(), base()
    _, (whole,), _ = trainer_on(together, quantile=0.2)
    batch_loss(together, 1, size=2).backward()
    _, (sum_of_two,), _ = trainer_on(apart, quantile=0.2)
    for sample in (1, 2):
        (batch_loss(apart, sample, size=1) / 2).backward()
    assert whole.values.grad is not None and sum_of_two.values.grad is not None
    assert torch.allclose(
        whole.values.grad, sum_of_two.values.grad, rtol=0, atol=1e-6
    )  # sums in another order
    assert whole.values.grad.abs().max() > 1e-4


def test_steps_are_those_of_adamw_on_the_masked_dense_problem(base: Base) -> None:
    pipe = base()
    dense = DenseProblem(pipe, masks_of(pipe, smallest(0.2)), rate=1e-2)
    before = weights(pipe)
    trainer, _, optimizer = trainer_on(pipe, quantile=0.2)
    for number in range(1, 5):
        seeds = (2 * number, 2 * number + 1)
        do_step(trainer, pipe, optimizer, number, seeds)
        dense.step(seeds)
    assert dense.largest_difference(pipe.unet) < 1e-6  # sums in another order
    for name, weight in pipe.unet.named_parameters():
        moved = weight != before[name]
        assert not moved[~dense.masks[name]].any(), name
        assert moved[dense.masks[name]].float().mean() > 0.9 or not dense.masks[name].any(), name


def test_reselection_freezes_where_entries_stand_and_starts_new_moments(tiny_sd: Base) -> None:
    pipe = tiny_sd()
    before = weights(pipe)
    masks = masks_of(pipe, smallest(0.2))
    bounds = {name: before[name][mask].abs().max() for name, mask in masks.items() if mask.any()}
    dense = DenseProblem(pipe, masks, rate=5e-3)
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.2, reselect_at=3, learning_rate=5e-3)
    chosen = part.values.numel()
    for number in range(1, 7):
        if number == 4:
            narrower = {
                name: mask & (dense.weights[name].detach().abs() <= bounds.get(name, torch.tensor(0.0)))
                for name, mask in masks.items()
            }
            dense.start(narrower)
        do_step(trainer, pipe, optimizer, number, (number,))
        dense.step((number,))
    assert part.values.numel() == sum(int(mask.sum()) for mask in narrower.values())
    assert 0.2 * chosen < part.values.numel() < 0.9 * chosen
    assert dense.largest_difference(pipe.unet) < 1e-6  # sums in another order
    state = optimizer.state[part.values]
    assert state["step"] == 3 and state["exp_avg"].shape == part.values.shape
    exported = trainer.export().changes
    assert sum(change.indices.numel() for change in exported.values()) == chosen  # type: ignore[attr-defined]
    for name, weight in dense.weights.items():
        if masks[name].any():
            change = exported[f"unet.{name}"].delta(weight, weight=1.0)
            assert torch.allclose(change, weight.detach() - before[name], rtol=0, atol=1e-6)  # as above


@pytest.mark.parametrize(("name", "rate"), [("adafactor", 0.5), ("lion", 5e-3), ("prodigy", 1.0)])
def test_any_optimizer_steps_as_on_a_vector_of_its_own_and_starts_anew_at_reselection(
    tiny_sd: Base, name: str, rate: float
) -> None:
    pipe = tiny_sd()
    before, masks = weights(pipe), masks_of(pipe, smallest(0.2))
    trainer, (part,), _ = trainer_on(pipe, quantile=0.2, reselect_at=3)
    chosen = part.values.numel()
    optimizer = trainer.optimizer([ParameterGroup("unet", [part.values], rate)], name=name, weight_decay=0.1)
    for number in range(1, 7):
        batch_loss(pipe, number).backward()
        trainer.before_clipping(number)
        if number in (1, 4):
            own = nn.Parameter(part.values.detach().clone())
            reference = make_optimizer(name, [ParameterGroup("unet", [own], rate)], weight_decay=0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * (1.1 - number / 10))
        # As a schedule does after each step.
        reference.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        assert part.values.grad is not None
        own.grad = part.values.grad.clone()
        for stepping in (reference, optimizer):
            stepping.step()
            stepping.zero_grad()
            stepping.param_groups[0]["lr"] = rate * (1 - number / 10)
        assert torch.equal(part.values, own), number
    assert own.numel() < chosen
    for weight, indices, segment in zip(
        part.plan.weights, part.plan.indices, part.plan.segments, strict=True
    ):
        assert torch.equal(weight.detach().flatten()[indices.long()], own.detach()[segment])
    for name, weight in pipe.unet.named_parameters():
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]]), name


def test_all_of_the_selections_rules_train_what_they_say(tiny_sd: Base) -> None:
    def largest(weight: Tensor) -> Tensor:
        flat = weight.abs().flatten()
        mask = torch.zeros(flat.shape, dtype=torch.bool)
        mask[(-flat).argsort(stable=True)[: round(0.1 * flat.numel())]] = True
        return mask.view(weight.shape)

    pipe = tiny_sd()
    dense = DenseProblem(pipe, masks_of(pipe, largest), rate=1e-2)
    trainer, _, optimizer = trainer_on(pipe, quantile=0.1, selection="largest")
    do_step(trainer, pipe, optimizer, 1, (1,))
    dense.step((1,))
    assert dense.largest_difference(pipe.unet) < 1e-6  # sums in another order
    pipe = tiny_sd()
    before = weights(pipe)
    trainer, _, optimizer = trainer_on(pipe, quantile=0.1, selection="random")
    do_step(trainer, pipe, optimizer, 1, (1,))
    for name, weight in pipe.unet.named_parameters():
        moved, number = weight.detach() != before[name], round(0.1 * weight.numel())
        assert int(moved.sum()) <= number
        if weight.numel() > 1000:
            assert int(moved.sum()) == number
            typical, of_moved = before[name].abs().mean(), before[name][moved].abs().mean()
            assert 0.7 < of_moved / typical < 1.3 or typical == of_moved


def live_bytes() -> int:
    """Return the memory behind all tensors that exist."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Asking what it is an instance of would wake lazy objects, and compiled graphs leave fake tensors.
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("dtype", "undo"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32-base", "bf16-base"]
)
def test_what_stays_is_16_bytes_an_entry_its_index_and_the_undo_copy(
    tiny_sd: Base, dtype: torch.dtype, undo: int
) -> None:
    pipe = tiny_sd().to(dtype)
    before = live_bytes()
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.6)
    batch_loss(pipe, 1).backward()
    optimizer.step()
    chosen = part.values.numel()
    # On the CPU the index and its copy for undoing are one; scalars and the last batch are the rest.
    assert 0 <= live_bytes() - before - chosen * (16 + 4 + undo) < 20_000 < chosen / 10
    optimizer.zero_grad()
    part.narrow()
    assert part.values.numel() < chosen
    do_step(trainer, pipe, optimizer, 2, (2,))
    moments = optimizer.state[part.values]
    assert moments["exp_avg"].numel() == moments["exp_avg_sq"].numel() == part.values.numel()


def test_no_two_dense_gradients_outlive_each_other(tiny_sd: Base) -> None:
    pipe, seen = tiny_sd(), []

    def count(weight: Tensor) -> None:
        seen.append(sum(other.grad is not None for other in pipe.unet.parameters()))

    pipe.unet.requires_grad_(True)
    for weight in pipe.unet.parameters():
        weight.register_post_accumulate_grad_hook(count)
    trainer, (part,), optimizer = trainer_on(pipe, quantile=0.2, rank_weight=1e-3)
    do_step(trainer, pipe, optimizer, 1, (1, 2))
    assert set(seen) == {1} and len(seen) == 2 * len(part.names)
    assert not any(weight.grad is not None for weight in pipe.unet.parameters())


def test_weights_without_chosen_entries_ask_for_no_gradient(tiny_sd: Base) -> None:
    pipe = tiny_sd()
    _, (part,), _ = trainer_on(pipe, threshold=1e-3)
    named = {f"unet.{name}" for name, weight in pipe.unet.named_parameters() if weight.requires_grad}
    assert named == set(part.names)
    # Norms begin at one.
    assert named and "unet.conv_norm_out.weight" not in named


def test_values_are_kept_in_fp32_above_a_16_bit_base(tiny_sd: Base) -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    before = weights(pipe)
    trainer, _, optimizer = trainer_on(pipe, quantile=0.2, learning_rate=1e-6, weight_decay=0.0)
    for number in range(1, 4):
        do_step(trainer, pipe, optimizer, number, (number,))
    name = "down_blocks.0.resnets.0.conv1.weight"
    change = trainer.export().changes[f"unet.{name}"]
    assert change.values.abs().median() > 1e-6  # type: ignore[attr-defined]
    weight = dict(pipe.unet.named_parameters())[name].detach()
    expected = before[name].float().flatten()
    expected[change.indices] += change.values  # type: ignore[attr-defined]
    assert torch.equal(weight.flatten(), expected.bfloat16())


def test_a_loss_scaler_changes_nothing_and_skips_overflows(tiny_sd: Base) -> None:
    plain, scaled = tiny_sd(), tiny_sd()
    trainer, _, optimizer = trainer_on(plain, quantile=0.2, rank_weight=0.1)
    do_step(trainer, plain, optimizer, 1, (1,))
    trainer, (part,), optimizer = trainer_on(scaled, quantile=0.2, rank_weight=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, factor in ((1, 1.0), (2, float("inf"))):
        scaler.scale(batch_loss(scaled, number) * factor).backward()
        scaler.unscale_(optimizer)
        trainer.before_clipping(number)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # A power of two scales without rounding; the second step must not have happened.
        assert all(
            torch.equal(a, b) for a, b in zip(scaled.unet.parameters(), plain.unet.parameters(), strict=True)
        )
    assert optimizer.state[part.values]["step"] == 1
