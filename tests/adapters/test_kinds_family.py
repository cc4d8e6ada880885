"""DoRA, LoHa, LoKr and OFT against their formulas in fp64, LyCORIS and peft, and what of others is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.dora import DoraChange
from studio.adapters.kinds.loha import LohaChange
from studio.adapters.kinds.lokr import LokrChange
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.kinds.oft import OftChange, block_side
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.errors import AdapterError
from studio.registry import KINDS

SHAPES = [(32, 48), (48, 32, 3, 3), (32, 32, 3, 3), (24, 40, 1, 1), (320, 768)]
FAMILY = ["dora", "loha", "lokr", "oft"]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def sample(kind: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    return KINDS[kind].sample(shape, generator=torch.Generator().manual_seed(seed))


def gap(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def dora_formula(change: DoraChange, base: Tensor, weight: float) -> Tensor:
    """Return the new weight, rows (or columns) one after another in fp64."""
    low = change.direction
    flat = low.up.double().flatten(1) @ low.down.double().flatten(1)
    turned = base.double() + weight * low.alpha / low.rank * flat.reshape(base.shape)
    along = 1 if change.per_input else 0
    result = turned.clone()
    for index, wanted in enumerate(change.magnitude.double()):
        old = base.double().select(along, index).norm()
        length = old + weight * (wanted - old)
        result.select(along, index).mul_(length / turned.select(along, index).norm())
    return result


@pytest.mark.parametrize("weight", [1.0, 0.6, -0.4])
@pytest.mark.parametrize("per_input", [False, True], ids=["per-output", "per-input"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_dora_is_the_formula_in_fp64(shape: tuple[int, ...], per_input: bool, weight: float) -> None:
    change = sample("dora", shape)
    if per_input:
        change = DoraChange(change.direction, random(shape[1]).abs() + 3, per_input=True)
    base = random(*shape, seed=1)
    wanted = dora_formula(change, base, weight) - base.double()
    assert gap(change.delta(base, weight=weight), wanted) < 1e-5  # fp32 norms and quotients.


def test_dora_at_weight_one_has_the_learned_lengths_and_keeps_rows_of_zeros() -> None:
    change, base = sample("dora", (6, 5)), random(6, 5)
    base[2] = 0
    change.direction.up[2] = 0
    merged = base + change.delta(base, weight=1.0)
    kept = [0, 1, 3, 4, 5]
    assert gap(merged.norm(dim=1)[kept], change.magnitude[kept]) < 1e-6  # One fp32 norm.
    assert not merged[2].any()


@pytest.mark.parametrize("weight", [1.0, 0.6, -2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oft_is_the_formula_in_fp64_and_turns_without_stretching(
    shape: tuple[int, ...], weight: float
) -> None:
    change, base = sample("oft", shape), random(*shape, seed=1)
    assert change.rescale is not None
    skew = weight * (change.blocks - change.blocks.mT).double()
    identity = torch.eye(skew.shape[-1], dtype=torch.float64)
    rotation = torch.block_diag(*((identity - block) @ torch.linalg.inv(identity + block) for block in skew))
    turned = rotation @ base.double().flatten(1)
    factor = 1 + weight * (change.rescale.double() - 1)
    wanted = (factor[:, None] * turned).reshape(shape) - base.double()
    assert gap(change.delta(base, weight=weight), wanted) < 1e-5  # One fp32 solution per block.
    plain = OftChange(change.blocks, None, shape)
    columns = (base + plain.delta(base, weight=weight)).flatten(1).norm(dim=0)
    assert gap(columns, base.flatten(1).norm(dim=0)) < 1e-5  # Rotations keep lengths, to fp32 rounding.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loha_and_lokr_are_their_formulas_in_fp64(shape: tuple[int, ...]) -> None:
    loha, base = sample("loha", shape), random(*shape)
    first = torch.einsum("or,ri->oi", loha.w1_a.double(), loha.w1_b.double())
    second = torch.einsum("or,ri->oi", loha.w2_a.double(), loha.w2_b.double())
    wanted = (0.7 * loha.scale * first * second).reshape(shape)
    assert gap(loha.delta(base, weight=0.7), wanted) < 1e-5  # fp32 sums.
    lokr = sample("lokr", shape)
    w1, w2 = whole(lokr.first), whole(lokr.second)
    wanted = torch.einsum("ac,bd->abcd", w1, w2).reshape(shape) * 0.7 * lokr.scale
    assert gap(lokr.delta(base, weight=0.7), wanted) < 1e-5  # fp32 sums.


def whole(factor: tuple[Tensor, ...]) -> Tensor:
    return factor[0].double().flatten(1) if len(factor) == 1 else factor[0].double() @ factor[1].double()


def layer_with(base: Tensor) -> torch.nn.Module:
    """Return a layer that has these weights."""
    if base.ndim == 2:
        layer: Any = torch.nn.Linear(base.shape[1], base.shape[0])
    else:
        layer = torch.nn.Conv2d(base.shape[1], base.shape[0], tuple(base.shape[2:]))
    layer.weight.data.copy_(base)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FAMILY)
def test_lycoris_makes_the_same_weight_of_our_parts(kind: str, shape: tuple[int, ...]) -> None:
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    change, base = sample(kind, shape), random(*shape, seed=1)
    parts = change.to_parts(alpha=2.5)
    tensors = {f"x.{part}": tensor for part, tensor in parts.items()}
    algorithm, parameters = modules.get_module(tensors, "x")
    theirs = modules.make_module(algorithm, parameters, "x", layer_with(base))
    merged, _ = theirs.get_merged_weight(multiplier=1, shape=base.shape)
    # fp32 in other orders; LyCORIS adds an epsilon to norms.
    assert gap(merged - base, change.delta(base, weight=1.0)) < 2e-5


def lycoris_module(name: str, base: Tensor, **options: Any) -> Any:
    """Return a module of LyCORIS with random values in all of its parameters."""
    module = pytest.importorskip(f"lycoris.modules.{name}", reason="lycoris-lora is not installed")
    classes = {
        "locon": "LoConModule",
        "loha": "LohaModule",
        "lokr": "LokrModule",
        "diag_oft": "DiagOFTModule",
    }
    made = getattr(module, classes[name])("x", layer_with(base), **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("lora", "locon", {"use_tucker": True}),
        ("dora", "locon", {"weight_decompose": True}),
        ("dora", "locon", {"weight_decompose": True, "wd_on_out": False}),
        ("dora", "locon", {"weight_decompose": True, "use_tucker": True}),
        ("loha", "loha", {}),
        ("loha", "loha", {"use_tucker": True}),
        ("lokr", "lokr", {}),
        ("lokr", "lokr", {"use_tucker": True}),
        ("lokr", "lokr", {"decompose_both": True, "factor": 16}),
        ("lokr", "lokr", {"full_matrix": True}),
        ("oft", "diag_oft", {}),
        ("oft", "diag_oft", {"rescaled": True}),
        ("oft", "diag_oft", {"constraint": 0.01}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("shape", [(256, 320), (64, 48, 3, 3)], ids=["linear", "conv"])
def test_files_of_lycoris_mean_what_its_own_forward_does(
    kind: str, name: str, options: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    base = random(*shape, seed=1) * 0.2
    sizes = {} if name == "diag_oft" else {"lora_dim": 3, "alpha": 2.0}
    theirs = lycoris_module(name, base, **sizes, **options)
    parts = (
        {part: tensor.detach() for part, tensor in theirs.custom_state_dict().items()}
        if sizes
        else (dict(theirs.state_dict()))
    )
    assert KINDS[kind].required <= parts.keys() <= KINDS[kind].required | KINDS[kind].optional
    change = KINDS[kind].from_parts(parts)["weight"].fitted(shape)
    inputs = random(4, shape[1], *(5 for _ in shape[2:]), seed=2)
    layer = theirs.org_module[0]
    with torch.no_grad():
        wanted = theirs(inputs) - layer(inputs)
        layer.weight.copy_(change.delta(base, weight=1.0))
        layer.bias.zero_()
        got = layer(inputs)
    assert gap(got, wanted) < 1e-4  # Differences of fp32 forward passes.


def test_diffusers_makes_the_same_weights_of_our_dora(
    tmp_path: Path, short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    ours, theirs = short_sd(), short_sd()
    adapter = everywhere(ours, kind="dora")
    path = save_adapter(adapter, tmp_path / "style.safetensors", format="diffusers", dtype=torch.float32)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    theirs.fuse_lora(components=["unet", "text_encoder"])
    got, plain = components_of(theirs), components_of(short_sd())
    with WeightBank(components_of(ours), adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        for name in canonical_names(plain):
            merged = find_parameter(got, name)
            if name in adapter.changes:
                assert gap(merged, find_parameter(components_of(ours), name)) < 1e-5, name  # fp32 norms.
            assert torch.equal(merged, find_parameter(plain, name)) == (name not in adapter.changes), name


def test_dora_that_diffusers_writes_is_read_with_its_magnitudes(
    tmp_path: Path, short_sd: Callable[[], Any]
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, base = short_sd(), short_sd()
    targets = ["to_q", "to_out.0", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    pipe.save_lora_weights(
        tmp_path,
        weight_name="theirs.safetensors",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    pipe.fuse_lora(components=["unet"])
    adapter = load_adapter(tmp_path / "theirs.safetensors", base=base)
    assert adapter.kind == "dora" and any(".conv1." in name for name in adapter.changes)
    for name, change in adapter.changes.items():
        weight = find_parameter(components_of(base), name).detach()
        merged = find_parameter(components_of(pipe), name).detach()
        assert gap(weight + change.delta(weight, weight=1.0), merged) < 1e-5, name  # fp32 norms.


def test_lokr_of_single_models_is_read_in_diffusers_spelling(
    tmp_path: Path, short_sd: Callable[[], Any]
) -> None:
    pipe = short_sd()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{layer}.lokr_w1": random(4, 8), f"unet.{layer}.lokr_w2": random(8, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", base=pipe)
    change = adapter.changes[f"unet.{layer}.weight"]
    assert adapter.kind == "lokr"
    assert torch.equal(change.delta(random(32, 32), weight=1.0), torch.kron(*tensors.values()))


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_what_diffusers_cannot_read_names_the_format_that_holds_it(
    tmp_path: Path, short_sd: Callable[[], Any], everywhere: Callable[..., Adapter], kind: str
) -> None:
    adapter = everywhere(short_sd(), kind=kind, components=("unet.mid_block",))
    words = "cannot be written in the format 'diffusers': diffusers reads LoRA and DoRA only.*choose kohya"
    with pytest.raises(AdapterError, match=words):
        save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers")


def test_diffusers_gets_no_dora_that_it_would_misread(tmp_path: Path) -> None:
    dora = sample("dora", (32, 32))
    turned = DoraChange(dora.direction, dora.magnitude, per_input=True)
    mixed = Adapter("a", "dora+lora", {"unet.a.weight": dora, "unet.b.weight": sample("lora", (32, 32))})
    for adapter, words in (
        (mixed, "all layers of a file for DoRA or none"),
        (
            Adapter("a", "dora", {"unet.a.weight": turned}),
            "one magnitude per output, 'unet.a.weight' has one per",
        ),
    ):
        with pytest.raises(AdapterError, match=words):
            save_adapter(adapter, tmp_path / "a.safetensors", format="diffusers")


def test_metadata_names_lycoris_where_kohyas_own_network_cannot_read_the_file(
    tmp_path: Path, short_sd: Callable[[], Any], everywhere: Callable[..., Adapter]
) -> None:
    from studio.adapters.files import read_header

    found = {}
    for kind in ("lora", *FAMILY):
        adapter = everywhere(short_sd(), kind=kind, components=("unet.mid_block",))
        metadata = read_header(save_adapter(adapter, tmp_path / f"{kind}.safetensors")).metadata
        found[kind] = (metadata["ss_network_module"], metadata["ss_network_args"])
    assert found == {
        "lora": ("networks.lora", "{}"),
        "dora": ("lycoris.kohya", '{"algo": "lora", "dora_wd": "True"}'),
        "loha": ("lycoris.kohya", '{"algo": "loha"}'),
        "lokr": ("lycoris.kohya", '{"algo": "lokr"}'),
        "oft": ("lycoris.kohya", '{"algo": "diag-oft"}'),
    }


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_alpha_in_files_is_what_all_tools_take_for_no_factor(kind: str) -> None:
    change = sample(kind, (320, 320))
    alpha = float(change.to_parts(alpha=7.0)["alpha"])
    assert alpha == {"loha": 3.0, "lokr": 2.0, "oft": 0.0}[kind]


@pytest.mark.parametrize(
    ("outputs", "largest", "side"),
    [(320, 8, 8), (320, 100, 16), (768, 30, 24), (32, 8, 4), (7, 8, 1), (1, 8, 1)],
)
def test_blocks_of_oft_divide_the_outputs_and_are_no_larger_than_many(
    outputs: int, largest: int, side: int
) -> None:
    assert block_side(outputs, largest=largest) == side


@pytest.mark.parametrize("ours", [(24, 40), (24, 40, 1, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", FAMILY)
def test_linear_layers_and_pointwise_convolutions_stand_for_each_other(
    kind: str, ours: tuple[int, ...]
) -> None:
    asked = (24, 40, 1, 1) if len(ours) == 2 else (24, 40)
    change, base = sample(kind, ours), random(24, 40)
    fitted = change.fitted(asked)
    assert fitted.shape == asked
    again = KINDS[kind].from_parts(fitted.to_parts(alpha=1.0))["weight"].fitted(asked)
    wanted = change.delta(base.reshape(ours), weight=0.5).flatten()
    assert gap(again.delta(base.reshape(asked), weight=0.5).flatten(), wanted) < 1e-6  # A folded scale.


@pytest.mark.parametrize("asked", [(40, 24), (24, 41), (24,), (24, 40, 3, 3), (24, 40, 1)], ids=str)
@pytest.mark.parametrize("kind", FAMILY)
def test_changes_fit_no_other_shape(kind: str, asked: tuple[int, ...]) -> None:
    if kind == "oft" and len(asked) in (2, 4) and asked[0] == 24:
        pytest.skip("a rotation of 24 outputs fits any number of inputs")
    assert sample(kind, (24, 40)).fitted(asked) is None


HADA = {f"hada_w{n}_{h}": torch.ones((6, 2) if h == "a" else (2, 5)) for n in "12" for h in "ab"}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 4)}
DORA = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("kind", "parts", "words"),
    [
        ("loha", HADA | {"hada_w1_b": torch.ones(3, 5)}, r"hada_w1_b .* and hada_w1_a .* differ in rank"),
        ("loha", HADA | {"hada_w2_a": torch.ones(7, 2)}, r"two products are of different sizes: \[6, 2\]"),
        ("loha", HADA | {"hada_t1": torch.ones(2, 2, 3, 3)}, "only go together"),
        ("loha", HADA | {f"hada_t{n}": torch.ones(3, 3, 3, 3) for n in "12"}, "are no Tucker factors"),
        ("loha", HADA | {"alpha": torch.tensor(0.0)}, "alpha is 0, which tools understand differently"),
        ("lokr", {"lokr_w1": torch.ones(2, 2)}, "it lacks lokr_w2, and lokr_w2_a or lokr_w2_b in its stead"),
        ("lokr", LOKR | {"lokr_w1_a": torch.ones(2, 2)}, "both lokr_w1 and lokr_w1_a, which are one factor"),
        ("lokr", LOKR | {"lokr_t2": torch.ones(2, 2, 3, 3)}, "lokr_t2 belongs to lokr_w2_a and lokr_w2_b"),
        ("lokr", LOKR | {"lokr_w2": torch.ones(3)}, "neither a linear layer nor a convolution"),
        ("lokr", LOKR | {"lokr_w2": torch.ones(3, 4).int()}, "lokr_w2 is torch.int32"),
        ("dora", DORA | {"dora_scale": torch.ones(7, 1)}, "one number for each of 6 outputs or 5 inputs"),
        ("dora", DORA | {"dora_scale": torch.ones(6, 5)}, "one number for each of 6 outputs or 5 inputs"),
        ("dora", DORA | {"dora_scale": torch.ones(6, 1).int()}, "dora_scale is torch.int32"),
        ("oft", {"oft_blocks": torch.ones(2, 3, 4)}, r"oft_blocks is \[2, 3, 4\], \[blocks, side, side\]"),
        ("oft", {"oft_blocks": torch.ones(1, 2, 3, 3)}, "butterfly variant BOFT"),
        ("oft", {"oft_blocks": torch.ones(2, 3, 3).int()}, "oft_blocks is torch.int32"),
        ("oft", {"oft_blocks": torch.ones(2, 3, 3), "rescale": torch.ones(5)}, "one number per output"),
        ("oft", {"oft_blocks": torch.ones(2, 3, 3), "alpha": torch.tensor(-1.0)}, "no bound on the rotation"),
    ],
)  # fmt: skip
def test_parts_that_make_no_change_are_refused(kind: str, parts: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KINDS[kind].from_parts(parts)


def test_missing_alpha_means_no_factor() -> None:
    assert LohaChange.from_parts(HADA)["weight"].scale == 1
    assert LokrChange.from_parts(LOKR | {"alpha": torch.tensor(5.0)})["weight"].scale == 1
    assert OftChange.from_parts({"oft_blocks": torch.ones(2, 3, 3)})["weight"].rescale is None
    dora = DoraChange.from_parts(DORA | {"dora_scale": torch.ones(6, 1)})["weight"]
    assert isinstance(dora.direction, LoraChange) and dora.alpha == dora.rank == 2
