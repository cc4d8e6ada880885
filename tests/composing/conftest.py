"""A tiny base on disk and two adapters for it, in files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
WEIGHTS = {"fox": 0.8, "ink": 0.5}


@pytest.fixture(scope="session")
def base(short_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    short_sd().save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="session")
def duo(short_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``fox.safetensors`` and ``ink.safetensors``, of rank 2, encoder included."""
    from studio.adapters.adapter import Adapter
    from studio.adapters.files import save_adapter
    from studio.adapters.kinds.lora import LoraChange
    from studio.adapters.parameters import canonical_names, components_of

    pipe = short_sd()
    names = canonical_names(components_of(pipe))
    layers = [name for name in names if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight"))]
    folder = tmp_path_factory.mktemp("duo")
    for seed, name in enumerate(("fox", "ink")):
        generator = torch.Generator().manual_seed(seed)
        changes = {}
        # The first layer is the fox's alone.
        for layer in (*layers[seed:], ENCODER):
            rows, columns = names[layer]
            size = float(torch.rand((), generator=generator))
            down, up = (torch.randn(shape, generator=generator) for shape in ((2, columns), (rows, 2)))
            changes[layer] = LoraChange(down, up * size, 1.0)
        adapter = Adapter(name, "lora", changes)
        save_adapter(adapter, folder / f"{name}.safetensors", format="kohya", base=pipe, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def composition(base: str, duo: Path) -> Callable[..., dict[str, Any]]:
    """Return a function: what to change -> the fields of a composition of fox (0.8) and ink (0.5)."""

    def fields(**values: Any) -> dict[str, Any]:
        uses = [
            {"path": str(duo / f"{name}.safetensors"), "weight": weight} for name, weight in WEIGHTS.items()
        ]
        return {"base": base, "adapters": uses, **values}

    return fields


@pytest.fixture(scope="session")
def deltas(duo: Path) -> dict[str, dict[str, Tensor]]:
    """Return the changes of each adapter by parameter, fp64, at weight 1."""
    from studio.adapters.files import load_adapter

    found = {}
    for name in WEIGHTS:
        changes = load_adapter(duo / f"{name}.safetensors").changes
        found[name] = {
            parameter: change.alpha / 2 * change.up.double() @ change.down.double()
            for parameter, change in changes.items()
        }
    return found
