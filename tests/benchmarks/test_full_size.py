"""Names and shapes in files of the full-size models, on the meta device; ``check_full_size`` trains them."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.formats import kohya
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.names import reference_components
from studio.adapters.parameters import canonical_names
from studio.registry import FORMATS, TRAINERS
from studio.specs import TrainSpec

sys.path.append(str(Path(__file__).parent))
import full_size

SIZES = {"sd1": (859_520_964, 686), "sdxl": (2_567_463_684, 1680)}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def family(request: pytest.FixtureRequest) -> Any:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def components(family: str) -> Any:
    return reference_components(family)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> full_size.Shapes:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def test_the_names_that_files_are_compared_with_are_those_of_the_whole_model(
    family: str, components: Any
) -> None:
    unet = {
        key: shape
        for key, shape in full_size.kohya_shapes(components).items()
        if key.startswith("lora_unet_")
    }
    assert (sum(map(math.prod, unet.values())), len(unet)) == SIZES[family]


def test_lora_files_name_every_attention_layer_as_other_tools_do(
    family: str, components: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is exported is copied to the CPU, and tensors without data cannot be.
    monkeypatch.setattr("studio.trainers.low_rank.copied", lambda tensor: tensor.detach())
    pipe: Any = SimpleNamespace(components=components, **components)
    spec = TrainSpec.model_validate(
        {"data": "a", "output": "a.safetensors", "rank": 4, "train_text_encoder": True}
    )
    for part in components.values():
        part.requires_grad_(False)
    trainer = TRAINERS["lora"]()
    trainer.prepare(pipe, spec)
    adapter = trainer.export()
    trainer.release()
    names = canonical_names(components)
    layers = {"sd1": 128 + 12 * 4, "sdxl": 560 + 12 * 4 + 32 * 4}[family]
    for form, parts in (("kohya", 3), ("diffusers", 2)):
        tensors, _ = FORMATS[form].write(adapter, family=family, names=names)
        shapes = full_size.kohya_shapes(components) if form == "kohya" else names
        assert shapes_of(tensors) == full_size.lora_file(shapes, rank=4, form=form)
        assert len(tensors) == parts * layers


def test_sara_files_name_every_parameter_of_the_unet(
    family: str, components: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written out in full they are as large as the model; without data that takes no memory.
    written_out = kohya._dense

    def without_data(change: SparseChange) -> torch.Tensor:
        with torch.device("meta"):
            return written_out(change)

    monkeypatch.setattr(kohya, "_dense", without_data)
    unet = canonical_names({"unet": components["unet"]})
    entry = torch.zeros(1, dtype=torch.int32)
    changes = {name: SparseChange(entry, torch.ones(1), shape) for name, shape in unet.items()}
    adapter = Adapter("sara", "sparse", changes)
    own, _ = FORMATS["sara"].write(adapter, family=family, names=unet)
    assert set(own) == {f"{name}.{part}" for name in unet for part in ("gaps", "delta", "shape")}
    assert all(tuple(own[f"{name}.shape"].tolist()) == shape for name, shape in unet.items())
    dense, _ = FORMATS["kohya"].write(adapter, family=family, names=unet)
    wanted = full_size.dense_file(full_size.kohya_shapes(components))
    assert shapes_of(dense) == {key: shape for key, shape in wanted.items() if key.startswith("lora_unet_")}
    assert len(dense) == SIZES[family][1]
