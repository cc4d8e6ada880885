"""What the options of methods that add layers change, and how many numbers each of them trains."""

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from studio.adapters.kinds.lokr import LokrChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.oft import OftChange
from studio.adapters.names import kohya_module, kohya_table, reference_names
from studio.errors import SpecError, TrainingError
from studio.registry import TRAINERS
from studio.specs import TrainSpec, parse_spec
from studio.trainers.base import ParameterGroup
from studio.trainers.targets import canonical_name


def specification(method: str = "lora", **options: Any) -> TrainSpec:
    return parse_spec(TrainSpec, {"method": method, "data": "d", "output": "o.safetensors"} | options)


def prepared(pipe: Any, method: str = "lora", **options: Any) -> tuple[Any, list[ParameterGroup]]:
    trainer = TRAINERS[method]()
    return trainer, list(trainer.prepare(pipe, specification(method, **options)))


def changes(pipe: Any, method: str = "lora", **options: Any) -> dict[str, Any]:
    trainer, _ = prepared(pipe, method, **options)
    found = dict(trainer.export().changes)
    trainer.release()
    return found


def numbers(method: str, shape: tuple[int, ...]) -> int:
    """Return how many numbers a method trains for a weight, by its paper and the options of the test."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    if method in ("lora", "dora"):
        return 4 * (outputs + inputs) + (outputs if method == "dora" else 0)
    if method == "loha":
        return 2 * 4 * (outputs + inputs)
    if method == "oft":
        return outputs * 8
    if method == "vera":
        return outputs + 32
    # Factor 16 divides all sides of these models.
    return 16 * 16 + outputs // 16 * (inputs // 16)


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {},
    "oft": {},
    "vera": {"rank": 32},
}


@pytest.mark.parametrize("method", list(OPTIONS))
@pytest.mark.parametrize(("family", "targets"), [("sd1", "attention"), ("sd1", "all"), ("sdxl", "all")])
def test_full_size_models_train_as_many_numbers_as_the_papers_say(
    full_size_unet: Callable[[str], nn.Module], family: str, method: str, targets: str
) -> None:
    if method == "vera":
        targets = "attention+ff"  # VeRA has no form for convolutions.
    unet = full_size_unet(family).requires_grad_(False)
    pipe: Any = SimpleNamespace(unet=unet, components={"unet": unet})
    trainer, groups = prepared(pipe, method, targets=targets, **OPTIONS[method])
    layers = [(name, layer) for _, name, layer in trainer.added]
    wanted = sum(numbers(method, tuple(layer.base_layer.weight.shape)) for _, layer in layers)
    assert sum(parameter.numel() for group in groups for parameter in group.parameters) == wanted
    if (family, method, targets) == ("sd1", "lora", "attention"):
        assert wanted == 797_184  # Known from the first LoRA of SD 1.5, of rank 4.
    known = reference_names(family)
    names = [canonical_name("unet", name) for name, _ in layers]
    assert all(
        known[name] == layer.base_layer.weight.shape for name, (_, layer) in zip(names, layers, strict=True)
    )
    table = kohya_table(known)
    modules = [name.removesuffix(".weight") for name in names]
    assert [table[kohya_module(module, sdxl=family == "sdxl")] for module in modules] == modules


def test_vera_has_no_option_for_convolutions() -> None:
    with pytest.raises(
        SpecError, match="targets: Input should be 'attention' or 'attention\\+ff', got 'all'"
    ):
        specification("vera", targets="all")


def test_ranks_and_alphas_by_block(tiny_sd: Callable[[], Any]) -> None:
    found = changes(
        tiny_sd(), rank=3, block_ranks={"mid_block": 5, "mid_block.attentions.0.proj_in": 2}, targets="all"
    )
    ranks = {name: change.rank for name, change in found.items()}
    assert set(ranks.values()) == {2, 3, 5} and all(change.alpha == change.rank for change in found.values())
    assert ranks["unet.mid_block.attentions.0.proj_in.weight"] == 2
    assert all((rank == 3) == ("mid_block" not in name) for name, rank in ranks.items())
    loha = changes(tiny_sd(), "loha", rank=3, alpha=6.0, block_ranks={"mid_block": 2})
    assert {(change.rank, change.scale) for change in loha.values()} == {(3, 2.0), (2, 3.0)}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rank_stabilised_scale_is_folded_into_alpha(tiny_sd: Callable[[], Any], method: str) -> None:
    found = changes(tiny_sd(), method, rank=4, alpha=3.0, rslora=True, block_ranks={"mid_block": 9})
    for name, change in found.items():
        rank = 9 if "mid_block" in name else 4
        assert change.alpha / change.rank == pytest.approx(3.0 / math.sqrt(rank)), name


def rates(groups: list[ParameterGroup]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for group in groups:
        found.setdefault(group.name, []).append(group.learning_rate)
    return found


def test_learning_rates_by_matrix_and_block(tiny_sd: Callable[[], Any]) -> None:
    options = {"learning_rate": 1e-3, "train_text_encoder": True, "lora_plus_ratio": 16.0}
    trainer, groups = prepared(
        tiny_sd(), **options, block_learning_rates={"mid_block": 2e-4, "layers.1": 3e-4}
    )
    assert {name: pytest.approx(found) for name, found in rates(groups).items()} == {
        "unet": [1e-3, 1.6e-2, 2e-4, 3.2e-3],
        "text_encoder": [5e-4, 8e-3, 3e-4, 4.8e-3],
    }
    by_parameter = {id(p): group.learning_rate for group in groups for p in group.parameters}
    for component, name, layer in trainer.added:
        down, up = (by_parameter[id(matrix["studio"].weight)] for matrix in (layer.lora_A, layer.lora_B))
        assert up == pytest.approx(16 * down)
        if "mid_block" in name or "layers.1" in name:
            assert down == (2e-4 if component == "unet" else 3e-4)


def test_a_frozen_down_matrix_needs_no_inputs_for_its_gradient(tiny_sd: Callable[[], Any]) -> None:
    trainer, groups = prepared(tiny_sd(), freeze_down=True, targets="all", rank=2)
    layers = [layer for _, _, layer in trainer.added]
    assert sum(len(group.parameters) for group in groups) == len(layers)
    assert not any(layer.lora_A["studio"].weight.requires_grad for layer in layers)
    linear = next(layer for layer in layers if isinstance(layer.base_layer, nn.Linear))
    saved: list[tuple[int, ...]] = []
    inputs = torch.randn(5, linear.base_layer.in_features)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear.lora_B["studio"](linear.lora_A["studio"](inputs))
    # What goes into the up matrix is kept, what goes into the down matrix is not.
    assert (5, 2) in saved and tuple(inputs.shape) not in saved


def test_dropout_works_in_training_only(tiny_sd: Callable[[], Any]) -> None:
    trainer, groups = prepared(tiny_sd(), dropout=0.5)
    layer = next(layer for _, _, layer in trainer.added)
    for group in groups:
        for parameter in group.parameters:
            parameter.data.fill_(0.1)
    inputs = torch.randn(64, layer.base_layer.in_features)
    assert torch.equal(layer(inputs), layer(inputs))
    layer.train()
    assert not torch.equal(layer(inputs), layer(inputs))


def test_the_file_of_a_mixer_is_the_product_of_all_three(tiny_sd: Callable[[], Any]) -> None:
    trainer, groups = prepared(tiny_sd(), moslora=True, rank=3, targets="all")
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for parameter in group.parameters:
            parameter.data.normal_(generator=generator)
    for component, name, layer in trainer.added:
        weight = layer.lora_B["studio"].parametrizations.weight
        down = layer.lora_A["studio"].weight.double().flatten(1)
        wanted = weight.original.double().flatten(1) @ weight[0].mixer.double() @ down
        change = trainer.change(layer)
        assert isinstance(change, LoraChange) and change.rank == 3
        got = change.delta(torch.zeros(change.shape), weight=1.0).flatten(1)
        assert torch.allclose(got.double(), wanted, rtol=0, atol=1e-4), (component, name)  # fp32 products.


def test_the_mixer_starts_orthogonal(tiny_sd: Callable[[], Any]) -> None:
    trainer, _ = prepared(tiny_sd(), moslora=True, rank=4)
    for _, _, layer in trainer.added:
        mixer = layer.lora_B["studio"].parametrizations.weight[0].mixer
        assert torch.allclose(mixer @ mixer.T, torch.eye(4), atol=1e-5)  # fp32.
        assert not torch.allclose(mixer, torch.eye(4), atol=1e-2)


@pytest.mark.parametrize("init", ["pissa", "lora-ga"])
def test_a_mixer_and_a_start_that_is_not_zero_exclude_each_other(init: str) -> None:
    with pytest.raises(SpecError, match=f"moslora: is of no use from the start '{init}'"):
        specification(init=init, moslora=True)


def test_kronecker_factors_have_the_sides_that_lycoris_can_load(tiny_sd: Callable[[], Any]) -> None:
    for options, first in (({}, (4, 4)), ({"factor": 2}, (2, 2)), ({"rank": 1, "factor": 2}, (2, 2))):
        found = changes(tiny_sd(), "lokr", targets="all", **options)
        assert all(isinstance(change, LokrChange) for change in found.values())
        # 32 outputs and inputs in most layers, and the square root bounds the first factor's side.
        change = found["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
        assert tuple(change.first[0].shape) == first and len(change.second) == 1 + ("rank" in options)
        assert all(
            side <= other for side, other in zip(change.first[0].shape, change.second[0].shape, strict=False)
        ) or ("rank" in options)
    with pytest.raises(SpecError, match="alpha: counts only where a rank is given"):
        specification("lokr", alpha=2.0)


def test_blocks_of_rotations_are_as_large_as_asked_for_where_that_fits(tiny_sd: Callable[[], Any]) -> None:
    found = changes(tiny_sd(), "oft", block_size=4)
    assert all(isinstance(change, OftChange) and change.blocks.shape[1] == 4 for change in found.values())
    assert {change.blocks.shape[1] for change in changes(tiny_sd(), "oft", block_size=2).values()} == {2}


def test_all_layers_of_vera_share_two_matrices(tiny_sd: Callable[[], Any]) -> None:
    trainer, groups = prepared(tiny_sd(), "vera", rank=6, d_initial=0.5)
    layers = [layer for _, _, layer in trainer.added]
    assert len({id(layer.vera_A) for layer in layers}) == len({id(layer.vera_B) for layer in layers}) == 1
    assert not any(name for name, _ in layers[0].named_parameters() if "vera_A" in name or "vera_B" in name)
    assert all(float(p.detach().min()) in (0.0, 0.5) for group in groups for p in group.parameters)
    found = changes(tiny_sd(), "vera", rank=6)
    assert {change.rank for change in found.values()} == {6} and all(
        isinstance(c, LoraChange) for c in found.values()
    )


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft", "vera"])
def test_parameters_are_fp32_on_a_16_bit_base(tiny_sd: Callable[[], Any], method: str) -> None:
    _, groups = prepared(tiny_sd().to(torch.float16), method)
    assert {parameter.dtype for group in groups for parameter in group.parameters} == {torch.float32}


def test_the_start_of_a_layer_does_not_depend_on_the_others(tiny_sd: Callable[[], Any]) -> None:
    first, narrower = changes(tiny_sd(), rank=2), changes(tiny_sd(), rank=2, exclude=("mid_block",))
    assert len(narrower) < len(first)
    assert all(torch.equal(first[name].down, change.down) for name, change in narrower.items())
    assert len({tuple(change.down.flatten()[:4].tolist()) for change in first.values()}) == len(first)


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_a_pipeline_with_loaded_adapters_is_refused(tiny_sd: Callable[[], Any], method: str) -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(TrainingError, match=r"peft adapters loaded\. Call pipe\.unload_lora_weights"):
        prepared(pipe, method)


def test_a_method_that_cannot_be_attached_leaves_the_base_as_it_was(
    tiny_sd: Callable[[], Any], monkeypatch: Any
) -> None:
    pipe = tiny_sd()
    before = {name: module for name, module in pipe.unet.named_modules()}
    monkeypatch.setattr(TRAINERS["lora"], "start", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(pipe)
    assert dict(pipe.unet.named_modules()) == before and not hasattr(pipe.unet, "peft_config")


def test_options_are_refused_by_the_specification() -> None:
    with pytest.raises(SpecError, match=r"rank.*greater than or equal to 1, got 0"):
        specification(rank=0)
    with pytest.raises(SpecError, match=r"block_ranks\.mid_block.*greater than 0, got 0"):
        specification(block_ranks={"mid_block": 0})
    with pytest.raises(SpecError, match=r"init: .*'default', 'pissa', 'lora-ga' or 'eva'"):
        specification(init="piza")


def test_block_options_are_flags(tmp_path: Any) -> None:
    from studio.flags import Parser, read_spec_arguments

    argv = [
        "--data",
        "d",
        "--output",
        "o.safetensors",
        "--block-ranks",
        "mid_block=4",
        "--block-ranks",
        "attn1=2",
    ]
    spec, _ = read_spec_arguments(Parser(), TrainSpec, [*argv, "--block-learning-rates", "mid_block=1e-4"])
    assert spec.options.model_dump()["block_ranks"] == {"mid_block": 4, "attn1": 2}
    assert spec.options.model_dump()["block_learning_rates"] == {"mid_block": 1e-4}


def test_methods_are_torch_free_at_import() -> None:
    code = (
        "import sys; from studio.registry import TRAINERS; "
        "assert TRAINERS['lora'].Options(rank=3).rank == 3 and len(TRAINERS.names()) > 5; "
        "assert not {'torch', 'diffusers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
