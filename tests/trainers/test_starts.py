"""PiSSA, LoRA-GA and EVA against exact decompositions and peft's own start."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from studio.adapters.adapter import Adapter
from studio.registry import TRAINERS
from studio.specs import TrainSpec
from studio.trainers.loop import train
from studio.trainers.starts import GAMMA, Directions, leading


def decaying(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Return a matrix with singular values 1, 0.7, 0.49 and so on."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return (left * 0.7 ** torch.arange(count)) @ right.T


def prepared(pipe: Any, **options: Any) -> Any:
    given = {"data": "d", "output": "o.safetensors", "rank": 3, "targets": "all"} | options
    trainer = TRAINERS["lora"]()
    trainer.prepare(pipe, TrainSpec.model_validate(given))
    return trainer


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the down and up matrix in fp64, kernels flattened."""
    down, up = (
        matrix["studio"].weight.detach().double().flatten(1) for matrix in (layer.lora_A, layer.lora_B)
    )
    return down, up


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 320), (40, 40)])
def test_leading_parts_are_those_of_the_exact_decomposition(rows: int, columns: int) -> None:
    matrix = decaying(rows, columns)
    left, values, right = leading(matrix.float(), 6, seed=0)
    exact = torch.linalg.svd(matrix)
    wanted = exact.U[:, :6] * exact.S[:6] @ exact.Vh[:6]
    assert torch.allclose(values.double(), exact.S[:6], rtol=1e-5, atol=0)  # fp32.
    assert torch.allclose((left * values @ right.mT).double(), wanted, atol=1e-5)  # fp32.


def test_a_decomposition_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = leading(decaying(30, 40), 2, seed=1)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(first, leading(decaying(30, 40), 2, seed=1), strict=True))


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"rslora": True}], ids=["plain", "alpha", "rslora"])
def test_pissa_starts_with_the_product_of_pefts_own_pissa(
    tiny_sd: Callable[[], Any], options: dict[str, Any]
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    pipe, theirs = tiny_sd(), tiny_sd()
    for unet in (pipe.unet, theirs.unet):
        for number, module in enumerate(unet.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                shape = module.weight.shape
                module.weight.data.copy_(decaying(shape[0], shape[1:].numel(), seed=number).reshape(shape))
    config = LoraConfig(
        r=3,
        lora_alpha=options.get("alpha", 3.0),
        use_rslora=options.get("rslora", False),
        init_lora_weights="pissa",
        target_modules=["to_q", "to_v"],
    )
    inject_adapter_in_model(config, theirs.unet)
    seen = 0
    for _, name, layer in prepared(pipe, init="pissa", **options).added:
        down, up = factors(layer)
        weight = layer.base_layer.weight.detach().double().flatten(1)
        exact = torch.linalg.svd(weight)
        wanted = exact.U[:, :3] * exact.S[:3] @ exact.Vh[:3]
        product = layer.scaling["studio"] * up @ down
        assert torch.allclose(product, wanted, atol=1e-4), name  # fp32 decompositions.
        if name.endswith(("to_q", "to_v")):
            peer = theirs.unet.get_submodule(name)
            a, b = (matrix["default"].weight.detach().double() for matrix in (peer.lora_A, peer.lora_B))
            assert torch.allclose(product, peer.scaling["default"] * b @ a, atol=1e-4)  # fp32.
            # The balanced split of the singular values between the two matrices, too.
            assert torch.allclose(down @ down.T, a @ a.T, atol=1e-4)  # fp32.
            seen += 1
    assert seen == 16


def test_the_base_keeps_its_bits_while_pissa_trains(tiny_sd: Callable[[], Any]) -> None:
    pipe = tiny_sd()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in pipe.unet.named_parameters()}
    trainer = prepared(pipe, init="pissa")
    for component, name, layer in trainer.added:
        pointer, value = before[f"{name}.weight"]
        weight = layer.base_layer.weight
        assert weight.data_ptr() == pointer and torch.equal(weight, value), (component, name)
    change = next(iter(trainer.export().changes.values()))
    assert change.rank == 6
    # Both halves are the same numbers, so only the order of the sum leaves anything.
    assert change.delta(torch.zeros(change.shape), weight=1.0).abs().max() < 1e-6


def quadratic(pipe: Any) -> Callable[[int], Tensor]:
    """Return a loss of the UNet's prediction on other numbers for each batch."""

    def loss(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        latents, states = (torch.randn(size, generator=generator) for size in ((2, 4, 16, 16), (2, 7, 32)))
        prediction: Tensor = pipe.unet(latents, torch.tensor([10, 700]), states).sample
        return prediction.square().mean()

    return loss


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_ga_starts_along_the_gradient_of_the_weights(
    tiny_sd: Callable[[], Any], alpha: float | None
) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    trainer = prepared(pipe, init="lora-ga", init_batches=2, alpha=alpha)
    wanted = [
        p for group in [trainer.parameters(layer) for _, _, layer in trainer.added] for p in group.values()
    ]
    trainer.warm_start(quadratic(pipe))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in wanted)
    plain.unet.requires_grad_(True)
    (quadratic(plain)(0) + quadratic(plain)(1)).backward()
    compared = 0
    for _, name, layer in trainer.added:
        weight = layer.base_layer.weight
        assert weight.grad is None and not weight.requires_grad
        gradient = plain.unet.get_submodule(name).weight.grad.double().flatten(1)
        exact = torch.linalg.svd(gradient, full_matrices=False)
        gaps = exact.S[[2, 5]] - exact.S[[3, 6]]
        if not gaps.min() > 0.02 * exact.S[0]:
            # Directions of nearly equal weight have no order.
            continue
        down, up = factors(layer)
        size = len(weight) ** 0.5 / GAMMA
        assert torch.allclose(down.T @ down, size * exact.Vh[:3].T @ exact.Vh[:3], atol=2e-3), name  # fp32.
        assert torch.allclose(up @ up.T, size * exact.U[:, 3:6] @ exact.U[:, 3:6].T, atol=2e-3), name  # fp32.
        compared += 1
    assert compared > 20


def test_lora_ga_starts_along_gradients_that_are_too_small_for_fp16(tiny_sd: Callable[[], Any]) -> None:
    def started(dtype: torch.dtype) -> list[Tensor]:
        pipe = tiny_sd()
        trainer = prepared(pipe, init="lora-ga", init_batches=1, targets="attention")
        pipe.unet.to(dtype)

        def loss(number: int) -> Tensor:
            generator = torch.Generator().manual_seed(number)
            latents, states = (
                torch.randn(size, generator=generator).to(dtype) for size in ((2, 4, 16, 16), (2, 7, 32))
            )
            prediction: Tensor = pipe.unet(latents, torch.tensor([10, 700]), states).sample
            return 1e-3 * prediction.float().square().mean()

        trainer.warm_start(loss)
        return [functional.normalize(factors(layer)[0]) for _, _, layer in trainer.added]

    alike = [
        float((one @ other.T).square().sum() / len(one))
        for one, other in zip(started(torch.float16), started(torch.float32), strict=True)
    ]
    assert sum(alike) / len(alike) > 0.95


def test_lora_ga_needs_room_for_twice_the_rank(tiny_sd: Callable[[], Any]) -> None:
    from studio.errors import TrainingError

    prepared(tiny_sd(), init="lora-ga", rank=16, targets="attention")
    with pytest.raises(TrainingError, match=r"rank must be at most 16 for .*\(32 x 32\), got 17"):
        prepared(tiny_sd(), init="lora-ga", rank=17, targets="attention")


def test_eva_starts_with_the_directions_of_the_inputs(tiny_sd: Callable[[], Any]) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    trainer = prepared(pipe, init="eva", init_batches=1)
    trainer.warm_start(quadratic(pipe))
    inputs: dict[str, Tensor] = {}
    for name, module in plain.unet.named_modules():
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.__setitem__(name, given[0]) if given else None
        )
    with torch.no_grad():
        quadratic(plain)(0)
    shares = []
    for _, name, layer in trainer.added:
        base = layer.base_layer
        rows = inputs[name].double()
        if isinstance(base, nn.Conv2d):
            rows = functional.unfold(rows, base.kernel_size, base.dilation, base.padding, base.stride).mT
        rows = rows.flatten(0, -2)
        exact = torch.linalg.svd(rows, full_matrices=False)
        down, up = factors(layer)
        assert not up.any()
        # The time projections see two timesteps only, and keep the rest of their random start.
        down, top = down[: len(rows)], exact.S[:3]
        identity = torch.eye(len(down), dtype=torch.float64)
        assert torch.allclose(down @ down.T, identity, atol=1e-4), name  # fp32.
        shares.append(float((rows @ down.T).square().sum() / top.square().sum()))
    # No other directions of that number hold more of the inputs; power iterations come close.
    assert min(shares) > 0.999 and max(shares) < 1.0001


def test_directions_of_several_batches_are_those_of_all_rows() -> None:
    batches = [(decaying(50, 24, seed=seed) * 0.8 ** torch.arange(24)).float() for seed in range(4)]
    seen = Directions(nn.Linear(24, 5), 3, seed=0)
    for batch in batches:
        seen.look(nn.Identity(), (batch[None],))
    rows = torch.cat(batches).double()
    exact = torch.linalg.svd(rows, full_matrices=False)
    assert seen.directions is not None
    share = (rows @ seen.directions.double().T).square().sum() / exact.S[:3].square().sum()
    # What falls far behind in one batch is forgotten, so a little is lost.
    assert 0.99 < float(share) < 1.0001


def test_patches_are_what_a_convolution_multiplies() -> None:
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    pictures = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    rows = Directions(layer, 2, seed=0)._rows(pictures)
    wanted = layer(pictures).flatten(2).mT.flatten(0, 1)
    assert torch.allclose(rows @ layer.weight.flatten(1).T, wanted, atol=1e-5)  # fp32 sums.


def test_inputs_of_little_variety_leave_the_rest_of_the_start() -> None:
    layer = SimpleNamespace(kernel_size=None)
    seen = Directions(layer, 4, seed=0)
    seen.look(nn.Identity(), (torch.ones(1, 6, 10),))
    assert seen.directions is not None and seen.directions.shape == (1, 10)
    assert seen.directions.abs().allclose(torch.full((1, 10), 10**-0.5))


@pytest.mark.parametrize("init", ["lora-ga", "eva", "pissa"])
def test_a_run_looks_at_its_first_batches_and_is_repeatable(
    tiny_sd: Callable[[], Any], spec: Callable[..., TrainSpec], init: str
) -> None:
    pipe = tiny_sd()
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}

    def run(**options: Any) -> Adapter:
        return train(pipe, spec(**{"steps": 1, "init": init, "init_batches": 1} | options))

    def same(one: Adapter, two: Adapter) -> bool:
        left, right = ({name: change.down for name, change in a.changes.items()} for a in (one, two))  # type: ignore[attr-defined]
        return all(torch.equal(left[name], right[name]) for name in left)

    first = run()
    torch.manual_seed(5)
    assert same(first, run())
    assert same(first, run(init_batches=2)) == (init == "pissa")
    twice = 2 if init == "eva" else 4
    assert not same(first, train(pipe, spec(steps=1, rank=twice)))
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())
