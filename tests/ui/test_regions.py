"""Regions on the page: what is painted for an adapter becomes its mask, and comes back."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from studio.composition.masks import read_masks
from studio.errors import UsageError
from studio.jobs import JobStore
from studio.specs import GenerateSpec, parse_spec
from studio.ui.follow import Follower
from studio.ui.generate_tab import MAX_ADAPTERS, GenerateTab
from studio.ui.regions import mask_of
from studio.workspace import Workspace, workspace

CHOSEN = ["fox.safetensors", "sub/owl.safetensors"]


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    space = workspace(tmp_path / "home")
    for name in CHOSEN:
        (space.adapters / name).parent.mkdir(exist_ok=True)
        (space.adapters / name).write_bytes(b"")
    return space


@pytest.fixture
def tab(space: Workspace) -> GenerateTab:
    tab = GenerateTab(space, Follower(JobStore(space.database)), lambda: "")
    with gr.Blocks():
        tab.layout()
    return tab


def painted(left: int, right: int) -> dict[str, Any]:
    """Return a canvas of 8 x 8 on which some columns are painted."""
    layer = np.zeros((8, 8, 4), dtype=np.uint8)
    layer[:, left:right] = (165, 180, 252, 255)
    return {"background": Image.new("RGBA", (8, 8), "black"), "layers": [Image.fromarray(layer)]}


def requested(tab: GenerateTab, canvases: list[Any], **changed: Any) -> Any:
    fields = [changed.get(field.name, field.component.value) for field in tab.form.fields]
    modifiers = [component.value for component in tab.modifiers.components]
    canvases = [*canvases, *([None] * (MAX_ADAPTERS - len(canvases)))]
    return tab.request({}, CHOSEN, *[1.0] * MAX_ADAPTERS, *modifiers, *fields, *canvases)


def test_what_is_painted_becomes_the_adapters_masks(tab: GenerateTab, space: Workspace) -> None:
    request = requested(tab, [painted(0, 3), painted(3, 8)], method="regions")
    options = parse_spec(GenerateSpec, request).options
    masks = read_masks(options.regions)  # type: ignore[attr-defined]
    assert list(masks) == ["fox", "owl"]
    assert masks["fox"][0, 0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 8
    assert (masks["fox"] + masks["owl"]).min() == 1 == (masks["fox"] + masks["owl"]).max()
    again = requested(tab, [painted(0, 3), painted(3, 8)], method="regions")
    assert again["regions"] == request["regions"] and len(list(space.uploads.glob("masks/*"))) == 2
    assert "regions" not in requested(tab, [painted(0, 3)], method="merge")


def test_masks_come_back_with_a_request(tab: GenerateTab, space: Workspace) -> None:
    request = requested(tab, [None, painted(3, 8)], method="regions", background="fox")
    shown = tab.show(request)[-MAX_ADAPTERS:]
    assert [update["visible"] for update in shown] == [True, True, *[False] * 6]
    assert shown[1]["value"] == request["regions"]["owl"] and isinstance(shown[0]["value"], Image.Image)
    Path(shown[1]["value"]).unlink()
    assert isinstance(tab.show(request)[-MAX_ADAPTERS + 1]["value"], Image.Image), "a file that is gone"


def test_an_adapter_keeps_what_is_painted_when_another_is_taken_off(tab: GenerateTab) -> None:
    fox, owl = painted(0, 3), painted(3, 8)
    values = [*[1.0] * MAX_ADAPTERS, fox, owl, *[None] * 6]
    first, second, *_ = tab._choose(CHOSEN[1:], CHOSEN, *values)[-MAX_ADAPTERS:]
    assert first["value"] is owl and first["label"] == "Region of sub/owl.safetensors"
    assert second["visible"] is False
    same, new, *_ = tab._choose(CHOSEN, CHOSEN[:1], *values)[-MAX_ADAPTERS:]
    assert "value" not in same, "a canvas that stays is not sent again"
    assert new["visible"] is True and isinstance(new["value"], Image.Image)


def test_a_mask_is_paint_or_white_of_a_picture() -> None:
    picture = Image.fromarray(np.tile(np.array([0, 128, 255, 0], dtype=np.uint8), (2, 1))).convert("RGBA")
    layer = Image.new("RGBA", (4, 2))
    layer.putpixel((3, 0), (1, 2, 3, 200))
    mask = mask_of({"background": picture, "layers": [layer]})
    assert np.asarray(mask).tolist() == [[0, 128, 255, 200], [0, 128, 255, 0]]
    clear = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    assert mask_of({"background": clear, "layers": []}) is None
    assert mask_of({"background": None, "layers": [layer]}) is not None


def test_regions_without_paint_are_refused_on_the_page(tab: GenerateTab) -> None:
    with pytest.raises(UsageError, match="nothing is painted"):
        requested(tab, [painted(0, 0), None], method="regions")
