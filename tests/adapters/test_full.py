"""Dense changes, and sparse ones in the dense form that other tools read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.kinds.full import FullChange
from studio.adapters.kinds.sparse import SparseChange
from studio.errors import AdapterError

Factory = Callable[[], Any]
CONV = "unet.mid_block.resnets.0.conv1"
NORM = "unet.mid_block.resnets.0.norm1"
KEYS = {module: "lora_unet_" + module.removeprefix("unet.").replace(".", "_") for module in (CONV, NORM)}


def _saved(path: Path, changes: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(save_adapter(Adapter("a", "full", changes), path, **options))


def test_layers_and_norms_are_named_as_other_tools_name_them(tmp_path: Path) -> None:
    changes = {
        f"{CONV}.weight": FullChange(torch.ones(32, 32, 3, 3)),
        f"{CONV}.bias": FullChange(torch.ones(32)),
        f"{NORM}.weight": FullChange(torch.ones(32)),
        f"{NORM}.bias": FullChange(torch.ones(32)),
    }
    keys = _saved(tmp_path / "a.safetensors", changes).keys()
    assert keys == {
        f"{KEYS[CONV]}.diff",
        f"{KEYS[CONV]}.diff_b",
        f"{KEYS[NORM]}.w_norm",
        f"{KEYS[NORM]}.b_norm",
    }


def test_zeros_stand_where_tools_want_the_other_parameter_too_and_count_for_no_change(
    tmp_path: Path, short_sd: Factory
) -> None:
    changes = {
        f"{CONV}.bias": FullChange(torch.ones(32)),
        f"{NORM}.bias": FullChange(torch.ones(32)),
        "unet.mid_block.resnets.0.norm2.weight": FullChange(torch.ones(32)),
    }
    tensors = _saved(tmp_path / "a.safetensors", changes, base=short_sd())
    assert tensors[f"{KEYS[CONV]}.diff"].shape == (32, 32, 3, 3) and not tensors[f"{KEYS[CONV]}.diff"].any()
    assert tensors[f"{KEYS[NORM]}.w_norm"].shape == (32,) and not tensors[f"{KEYS[NORM]}.w_norm"].any()
    assert len(tensors) == 6
    assert load_adapter(tmp_path / "a.safetensors", base=short_sd()).changes.keys() == changes.keys()


def test_change_of_nothing_but_zeros_is_still_a_change(tmp_path: Path, short_sd: Factory) -> None:
    _saved(tmp_path / "a.safetensors", {f"{CONV}.weight": FullChange(torch.zeros(32, 32, 3, 3))})
    assert list(load_adapter(tmp_path / "a.safetensors", base=short_sd()).changes) == [f"{CONV}.weight"]


def test_shape_of_a_weight_that_does_not_change_is_known_of_full_size_models_and_else_asked_for(
    tmp_path: Path, short_sd: Factory
) -> None:
    bias = {f"{CONV}.bias": FullChange(torch.ones(1280))}
    tensors = _saved(tmp_path / "a.safetensors", bias, metadata={"ss_base_model_version": "sd_v1"})
    assert tensors[f"{KEYS[CONV]}.diff"].shape == (1280, 1280, 3, 3)
    for options in ({}, {"metadata": {"ss_base_model_version": "sd_v1"}}):
        with pytest.raises(AdapterError, match=f"of '{CONV}' only the bias changes.*give the base"):
            _saved(tmp_path / "b.safetensors", {f"{CONV}.bias": FullChange(torch.ones(32))}, **options)


def test_sparse_changes_are_written_in_full_without_rounding(tmp_path: Path, short_sd: Factory) -> None:
    # An fp16 file would hold nothing of the second value.
    change = SparseChange(
        torch.tensor([3, 9000], dtype=torch.int32), torch.tensor([0.5, 1e-9]), (32, 32, 3, 3)
    )
    tensors = _saved(tmp_path / "a.safetensors", {f"{CONV}.weight": change})
    diff = tensors[f"{KEYS[CONV]}.diff"]
    assert diff.dtype == torch.float32 and torch.equal(diff, change.delta(diff, weight=1.0))
    loaded = load_adapter(tmp_path / "a.safetensors", base=short_sd())
    assert loaded.kind == "full" and torch.equal(
        loaded.changes[f"{CONV}.weight"].delta(diff, weight=1.0), diff
    )


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"diff": torch.ones(3, 2), "w_norm": torch.ones(3)}, "belong to a layer and to a norm"),
        ({"diff": torch.ones(3, 2), "diff_b": torch.ones(2)}, r"diff \[3, 2\] and diff_b \[2\] differ"),
        ({"w_norm": torch.ones(3, 1)}, r"w_norm \[3, 1\] are of no linear layer, convolution or norm"),
        ({"diff_b": torch.ones(3, 1)}, r"diff_b \[3, 1\] are of no"),
        ({"diff": torch.ones(())}, r"diff \[\] are of no"),
        ({"diff": torch.ones(2, 2, 2)}, r"diff \[2, 2, 2\] are of no"),
        ({"diff": torch.ones(2, 0)}, r"\[2, 0\] is the shape of no parameter"),
        ({"diff": torch.ones(2, 2).int()}, "torch.int32, a floating type was expected"),
    ],
    ids=["mixed", "lengths", "norm-axes", "bias-axes", "scalar", "axes", "empty", "integers"],
)
def test_parts_that_make_no_dense_change_are_refused(parts: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FullChange.from_parts(parts)


@pytest.mark.parametrize("norm", ["diff", "w_norm"])
def test_norms_are_read_in_both_spellings(tmp_path: Path, short_sd: Factory, norm: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{KEYS[NORM]}.{norm}": torch.full((32,), 2.0)}, path)
    change = load_adapter(path, base=short_sd()).changes[f"{NORM}.weight"]
    assert torch.equal(change.delta(torch.zeros(32), weight=0.5), torch.ones(32))


@pytest.mark.parametrize("width", [768, 1024])
def test_family_is_told_by_the_width_of_a_dense_change(tmp_path: Path, short_sd: Factory, width: int) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    path = save_adapter(
        Adapter("a", "full", {layer: FullChange(torch.ones(1280, width))}), tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterError, match={768: "holds SD 1.5 keys", 1024: r"holds SD 2.x keys"}[width]):
        load_adapter(path, base=short_sd())
