"""A grid: each picture is what its values ask for and is drawn once; one labelled picture holds all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import studio
from studio.batches.grid import label, lay_out
from studio.cli import main
from studio.errors import CompositionError, OutputError, SpecError
from studio.png import read_spec
from studio.specs import GenerateSpec, GridSpec, parse_spec


@pytest.fixture(scope="module")
def duo(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with adapters ``fox`` and ``ink``."""
    import torch

    from studio.adapters.adapter import Adapter
    from studio.adapters.kinds.lora import LoraChange

    folder, pipe = tmp_path_factory.mktemp("duo"), studio.load_base(tiny_base, device="cpu")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    for seed, stem in enumerate(("fox", "ink")):
        change = LoraChange.sample((32, 32), generator=torch.Generator().manual_seed(seed))
        adapter = Adapter(stem, "lora", {name: change})
        studio.save_adapter(adapter, folder / f"{stem}.safetensors", format="diffusers", base=pipe)
    return folder


def grid(base: str, output: Path, **values: Any) -> GridSpec:
    given = {"base": base, "prompt": "a fox", "steps": 1, "device": "cpu", "output": output}
    return parse_spec(GridSpec, {**given, **values})


def cells(**values: Any) -> list[GenerateSpec]:
    """Return the specifications of a grid's pictures."""
    return [each.spec for each in lay_out(parse_spec(GridSpec, {"prompt": "a fox", **values})).pictures]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("seed=1-4", (1, 2, 3, 4)),
        ("seed=7,1-5(+2),9007199254740993", (7, 1, 3, 5, 9007199254740993)),
        ("steps=1-10[4]", (1, 4, 7, 10)),
        ("guidance-scale=0-1[5]", (0, 0.25, 0.5, 0.75, 1)),
        ("guidance_scale=1 - 1.3 (+0.1)", (1, 1.1, 1.2, 1.3)),
        ('prompt="a red, old fox",a 1-4 cat', ("a red, old fox", "a 1-4 cat")),
        ({"width": [64, 128]}, (64, 128)),
        ({"seed": "1-2"}, (1, 2)),
        ({"prompt": ["a, b", "c"]}, ("a, b", "c")),
    ],
    ids=str,
)
def test_an_axis_is_a_field_and_its_values(axis: Any, values: tuple[Any, ...]) -> None:
    field = parse_spec(GridSpec, {"prompt": "x", "x": axis}).x.field
    assert tuple(getattr(spec, field) for spec in cells(x=axis)) == values


def test_pictures_come_row_by_row_and_block_by_block() -> None:
    found = cells(x="seed=1,2", y="steps=3,4", z="scheduler=ddim,euler")
    assert [(spec.scheduler, spec.steps, spec.seed) for spec in found] == [
        (scheduler, steps, seed) for scheduler in ("ddim", "euler") for steps in (3, 4) for seed in (1, 2)
    ]
    assert cells(x="seed=1,2", z="steps=3,4")[2].steps == 4


def test_methods_bring_their_options(duo: Path) -> None:
    uses = [str(duo / "fox.safetensors"), str(duo / "ink.safetensors")]
    found = cells(
        adapters=uses, method="switch", switch_every=3, x='method=merge,switch,"switch:switch_every=2"'
    )
    assert [spec.method for spec in found] == ["merge", "switch", "switch"]
    assert [getattr(spec.options, "switch_every", None) for spec in found] == [None, 3, 2]
    turns = cells(adapters=uses, method="switch", x="switch-every=1-2")
    assert [spec.options.switch_every for spec in turns] == [1, 2]


def test_adapters_and_modifiers_of_an_axis_join_those_that_are_there(duo: Path) -> None:
    fox, ink = str(duo / "fox.safetensors"), str(duo / "ink.safetensors")
    found = cells(adapters=[ink], modifiers="cache:interval=2", x=f"adapter=none,{fox},{fox}:0.5")
    assert [[(use.path.stem, use.weight) for use in spec.adapters] for spec in found] == [
        [("ink", 1)], [("ink", 1), ("fox", 1)], [("ink", 1), ("fox", 0.5)],
    ]  # fmt: skip
    assert all(list(spec.modifiers) == ["cache"] for spec in found)
    plain, changed = cells(adapters=[ink], modifiers="cache:interval=2", x="with=none,skip-guidance")
    assert (list(plain.modifiers), list(changed.modifiers)) == (["cache"], ["cache", "skip-guidance"])


def test_weights_are_those_of_all_adapters_or_of_one_also_of_the_prompts(duo: Path) -> None:
    given: dict[str, Any] = {"prompt": "a fox <lora:ink:0.3>", "adapter_folder": duo}
    given["adapters"] = [str(duo / "fox.safetensors")]

    def weights(axis: str) -> list[list[float]]:
        return [[use.weight for use in spec.adapters] for spec in cells(x=axis, **given)]

    assert weights("weight=0.5,2") == [[0.5, 0.5], [2, 2]]
    assert weights("weight.ink=0-1[3]") == [[1, 0], [1, 0.5], [1, 1]]


def test_replace_puts_each_value_in_the_place_of_the_first() -> None:
    given: dict[str, Any] = {"prompt": "a fox, a red fox", "negative_prompt": "no fox"}
    found = cells(x="replace=fox,cat", **given)
    assert [(spec.prompt, spec.negative_prompt) for spec in found] == [
        ("a fox, a red fox", "no fox"),
        ("a cat, a red cat", "no cat"),
    ]
    both = cells(x="replace=fox,cat", y="prompt=a fox,one fox --s 3")
    assert [(spec.prompt, spec.steps) for spec in both][3] == ("one cat", 3)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"x": "seed"}, "x: 'seed' must be FIELD=VALUE,VALUE"),
        ({"x": "seed="}, "x: 'seed=' must be FIELD=VALUE,VALUE"),
        ({"x": "switch_every=1-4"}, "x: 'switch_every' is an option of other methods: .*Choose one"),
        ({"x": "seed=1-20000"}, "x: '1-20000' has 20000 values, at most 10000"),
        ({"x": "stepz=1"}, "x: there is no 'stepz'. Did you mean 'steps'"),
        ({"x": "device=cpu,cuda"}, "there is no 'device'"),
        ({"x": "seed=1", "y": "seed=2"}, "x and y are both 'seed'"),
        ({"x": "steps=0,5,2000"}, r"x: steps: .*got '0'.*\nx: steps: .*got '2000'"),
        ({"x": "seed=4-1"}, "'4-1' is no range, which goes up"),
        ({"x": "seed=1-5(+0)"}, "is no range"),
        ({"x": "seed=1-9999", "y": "steps=1,2"}, "19998 pictures, at most 10000"),
        ({"x": "method=merge,swich"}, "unknown composition method 'swich'. Did you mean 'switch'"),
        ({"x": "with=cahe"}, "unknown plan modifier 'cahe'"),
        ({"x": "weight=0.5,1"}, "weight: there is no adapter. Give --adapter"),
        ({"x": "weight.inc=1", "adapters": "ink.safetensors"}, r"no adapter 'inc'. Did you mean 'ink'\?"),
        ({"x": "replace=cat,dog"}, "replace: 'cat' stands neither in the prompt 'a fox' nor"),
        ({"x": "seed=1,1"}, "'seed 1' stands twice"),
        ({"x": "steps=1,2", "prompt": "a fox --s 9"}, "what the prompt itself says counts above"),
    ],
)  # fmt: skip
def test_axes_that_mean_nothing_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        cells(**values)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("guidance_scale", "5", "guidance scale 5"),
        ("prompt", "a fox", "a fox"),
        ("method", "switch:switch_every=2", "switch: switch_every=2"),
        ("adapter", "folder/ink.safetensors:0.5", "ink:0.5"),
        ("adapter", "none", "no adapter"),
        ("base", "bases/own.safetensors", "base own.safetensors"),
    ],
)
def test_a_label_says_what_a_person_calls_the_value(field: str, value: str, words: str) -> None:
    assert label(field, value) == words


def test_a_grid_with_a_picture_that_cannot_be_drawn_draws_none(
    tiny_base: str, duo: Path, tmp_path: Path
) -> None:
    adapters = [str(duo / f"{name}.safetensors") for name in ("fox", "ink")]
    given = {"x": "method=merge,switch", "y": "seed=1-2", "adapters": adapters, "steps": 3}
    with pytest.raises(CompositionError, match=r"^[^:]*switch[^:]*: switch_every=5 in a run of 3 steps"):
        studio.draw_grid(grid(tiny_base, tmp_path / "out", **given))
    assert not list(tmp_path.rglob("*.png"))


def test_a_grid_is_drawn_once_and_shown_in_one_picture(tiny_base: str, tmp_path: Path) -> None:
    spec = grid(tiny_base, tmp_path, x="seed=1,2", y="guidance-scale=1,9", z={"prompt": ["a fox", "a cat"]})
    result = studio.draw_grid(spec)
    assert (result.drawn, result.kept, result.grid) == (8, 0, tmp_path / "grid.png")
    names = [
        "0001-1.png",
        "0002-2.png",
        "0003-1.png",
        "0004-2.png",
        *(f"000{5 + n}-{1 + n % 2}.png" for n in range(4)),
    ]
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == names
    lines = [json.loads(line) for line in result.manifest.read_text().splitlines()]
    assert {line["file"]: (line["z"], line["y"], line["x"]) for line in lines}["0007-1.png"] == (
        "a cat", "guidance scale 9", "seed 1",
    )  # fmt: skip
    drawn = read_spec(tmp_path / "0007-1.png")
    assert (drawn.prompt, drawn.guidance_scale, drawn.seed) == ("a cat", 9, 1)

    with Image.open(result.grid) as sheet:
        found = sheet.convert("RGB")
    # Each picture stands, 128 pixels wide, in its row and column and nowhere else.
    pictures = [
        Image.open(tmp_path / name).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
        for name in names
    ]
    places = [_places(found, picture) for picture in pictures]
    assert all(len(place) == 1 for place in places)
    (columns, rows) = ([place[0][axis] for place in places] for axis in (0, 1))
    assert columns[::2] == columns[:1] * 4 and columns[1::2] == columns[1:2] * 4 and columns[0] < columns[1]
    assert rows[::2] == rows[1::2] == sorted(set(rows)) and len(set(rows)) == 4

    again = studio.draw_grid(spec)
    assert (again.drawn, again.kept) == (0, 8)
    (tmp_path / "0003-1.png").unlink()
    assert studio.draw_grid(spec).drawn == 1


def _places(sheet: Image.Image, picture: Image.Image) -> list[tuple[int, int]]:
    """Return where in a sheet a picture stands exactly."""
    here, wanted = np.asarray(sheet).astype(int), np.asarray(picture)
    size = wanted.shape[0]
    starts = np.argwhere((here[: 1 - size, : 1 - size] == wanted[0, 0]).all(axis=-1))
    return [(x, y) for y, x in starts.tolist() if (here[y : y + size, x : x + size] == wanted).all()]


def test_a_picture_of_a_grid_is_what_generate_draws(tiny_base: str, duo: Path, tmp_path: Path) -> None:
    uses = [str(duo / "fox.safetensors"), str(duo / "ink.safetensors")]
    spec = grid(tiny_base, tmp_path / "grid", adapters=uses, steps=2, x="method=merge,switch:switch_every=1")
    studio.draw_grid(spec)
    given: dict[str, Any] = {
        "base": tiny_base,
        "prompt": "a fox",
        "steps": 2,
        "device": "cpu",
        "adapters": uses,
    }
    alone = parse_spec(GenerateSpec, {**given, "method": "switch", "switch_every": 1, "output": tmp_path})
    (result,) = studio.generate(alone)
    with (
        Image.open(tmp_path / "grid" / "0002-0.png") as picture,
        Image.open(tmp_path / "grid" / "0001-0.png") as other,
    ):
        assert picture.tobytes() == result.image.tobytes() != other.tobytes()


def test_a_foreign_grid_picture_is_not_replaced_and_a_stop_makes_none(tiny_base: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    spec = grid(tiny_base, tmp_path, x="seed=1,2")
    with pytest.raises(OutputError, match=r"grid.png' exists"):
        studio.draw_grid(spec)
    (tmp_path / "grid.png").unlink()
    stopped = studio.draw_grid(spec, stop=lambda: True)
    assert stopped.stopped and stopped.grid is None and not (tmp_path / "grid.png").exists()


def test_the_command_draws_a_grid(tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "grid.toml"
    config.write_text('prompt = "a fox"\nsteps = 1\ny = "guidance-scale=1,5"\n', encoding="utf-8")
    output = tmp_path / "out"
    command = ["generate", "--base", tiny_base, "--config", str(config), "--x", "seed=1-2", "--device", "cpu"]
    assert main([*command, "--batch", "2", "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output / "grid.png") and "4 of 4 pictures drawn" in said.err
    assert main(["generate", "--prompt", "a fox", "--y", "seed=1"]) == 2
    assert "x: is required" in capsys.readouterr().err
