"""Regions on the page: what is dropped or painted for an adapter becomes its mask, and comes back."""

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from studio.composition.masks import read_masks
from studio.errors import DataError, UsageError
from studio.jobs import JobStore
from studio.specs import GenerateSpec, parse_spec
from studio.ui.follow import Follower
from studio.ui.generate_tab import MAX_ADAPTERS, GenerateTab
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


def mask(space: Workspace, left: int, right: int) -> str:
    """Write a mask of 8 x 8, white in some columns, and return its path."""
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:, left:right] = 255
    path = space.uploads / f"{left}-{right}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def data_url(picture: Image.Image) -> str:
    """Return a picture as the canvas gives it away."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def requested(tab: GenerateTab, masks: list[Any], **changed: Any) -> Any:
    fields = [changed.get(field.name, field.component.value) for field in tab.form.fields]
    modifiers = [component.value for component in tab.modifiers.components]
    masks = [*masks, *([None] * (MAX_ADAPTERS - len(masks)))]
    return tab.request({}, CHOSEN, *[1.0] * MAX_ADAPTERS, *modifiers, *fields, *masks)


def test_masks_become_the_adapters_regions(tab: GenerateTab, space: Workspace) -> None:
    dropped = [mask(space, 0, 3), mask(space, 3, 8)]
    request = requested(tab, dropped, method="regions")
    options = parse_spec(GenerateSpec, request).options
    masks = read_masks(options.regions)  # type: ignore[attr-defined]
    assert list(masks) == ["fox", "owl"]
    assert masks["fox"][0, 0].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 8
    assert (masks["fox"] + masks["owl"]).min() == 1 == (masks["fox"] + masks["owl"]).max()
    again = requested(tab, dropped, method="regions")
    assert again["regions"] == request["regions"] and len(list(space.uploads.glob("masks/*"))) == 2
    assert "regions" not in requested(tab, dropped, method="merge")


def test_masks_come_back_with_a_request(tab: GenerateTab, space: Workspace) -> None:
    request = requested(tab, [None, mask(space, 3, 8)], method="regions", background="fox")
    shown = dict(zip(map(id, tab.request_outputs), tab.show(request), strict=True))
    first, second, *others = (shown[id(component)] for component in tab.regions.masks)
    assert (first["visible"], second["visible"], {other["visible"] for other in others}) == (
        True,
        True,
        {False},
    )
    assert (first["value"], second["value"]) == (None, request["regions"]["owl"])
    assert [shown[id(taker)]["visible"] for taker in tab.regions.takers] == [True, True, *[False] * 6]
    Path(second["value"]).unlink()
    shown = dict(zip(map(id, tab.request_outputs), tab.show(request), strict=True))
    assert shown[id(tab.regions.masks[1])]["value"] is None, "a file that is gone"


def test_an_adapter_keeps_its_region_when_another_is_taken_off(tab: GenerateTab, space: Workspace) -> None:
    fox, owl = mask(space, 0, 3), mask(space, 3, 8)
    values = [*[1.0] * MAX_ADAPTERS, fox, owl, *[None] * 6]
    first, second, *_ = tab._choose(CHOSEN[1:], CHOSEN, *values)[-2 * MAX_ADAPTERS :]
    assert (first["value"], first["label"]) == (owl, "Region of sub/owl.safetensors")
    assert (second["value"], second["visible"]) == (None, False)


def test_what_is_painted_becomes_a_mask_and_nothing_leaves_it_as_it_was(tab: GenerateTab) -> None:
    canvas = Image.new("RGBA", (4, 2))
    assert tab.regions.take(data_url(canvas)) == gr.skip()
    canvas.putpixel((3, 0), (255, 255, 255, 200))
    with Image.open(tab.regions.take(data_url(canvas))) as kept:
        assert np.asarray(kept).tolist() == [[0, 0, 0, 200], [0, 0, 0, 0]]


def test_a_region_is_white_of_a_picture_on_black(tab: GenerateTab, space: Workspace) -> None:
    picture = np.full((2, 4, 4), 255, dtype=np.uint8)
    picture[..., 3] = [0, 128, 255, 0]
    Image.fromarray(picture).save(space.uploads / "clear.png")
    (kept,) = requested(tab, [str(space.uploads / "clear.png")], method="regions")["regions"].values()
    with Image.open(kept) as seen:
        assert np.asarray(seen).tolist() == [[0, 128, 255, 0]] * 2


def test_black_masks_and_files_that_are_no_pictures_are_refused_on_the_page(
    tab: GenerateTab, space: Workspace
) -> None:
    with pytest.raises(UsageError, match="no adapter has a region"):
        requested(tab, [mask(space, 0, 0), None], method="regions")
    (space.uploads / "note.png").write_text("fox")
    with pytest.raises(DataError, match=r"'note\.png' is no picture"):
        requested(tab, [str(space.uploads / "note.png")], method="regions")
