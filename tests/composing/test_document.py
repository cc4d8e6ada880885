"""Composition documents say all of a composition, wherever they and their adapters are moved together."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import studio
from studio import cli
from studio.adapters.header import tensor_hash
from studio.composing.document import read_composition, write_composition
from studio.errors import OutputError, UsageError
from studio.specs import CompositionSpec, Event, GenerateSpec, parse_spec
from studio.specs.composing import PlanSpec

OPTIONS: dict[str, Any] = {
    "method": "klora",
    "options": {"alpha": 1.25, "content": "ink"},
    "modifiers": {
        "schedule": {"weights": {"fox": [[0, 0], [0.3, 1]]}},
        "cache": {"interval": 2, "full_first": 1},
    },
}


def test_what_is_written_is_read_again(
    composition: Callable[..., dict[str, Any]], duo: Path, tmp_path: Path
) -> None:
    spec = parse_spec(CompositionSpec, composition(**OPTIONS))
    path = write_composition(spec, tmp_path / "new" / "duo.toml")
    read = read_composition(path)
    names = ("adapters", "expected_hashes")
    assert read.model_dump(exclude=set(names)) == spec.model_dump(exclude=set(names))
    assert [(use.name, use.path, use.weight) for use in read.adapters] == [
        ("fox", duo / "fox.safetensors", 0.8),
        ("ink", duo / "ink.safetensors", 0.5),
    ]
    assert read.expected_hashes == {
        str(duo / f"{name}.safetensors"): tensor_hash(duo / f"{name}.safetensors") for name in ("fox", "ink")
    }
    again = write_composition(read, tmp_path / "again.toml")
    assert read_composition(again) == read


def test_a_document_and_what_lies_beside_it_may_be_moved(
    base: str, duo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(duo, tmp_path / "here")
    shutil.copytree(base, tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    spec = CompositionSpec.model_validate({"base": "base", "adapters": ["fox.safetensors:0.5"]})
    write_composition(spec, "duo.toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    read = read_composition("there/duo.toml")
    assert (Path(read.base), read.adapters[0].path) == (
        Path("there/base"),
        Path("there/fox.safetensors"),
    )
    assert read_composition("there/duo.toml", home="else").adapters[0].path == Path("else/fox.safetensors")


def test_masks_lie_beside_the_document_too(
    duo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(duo, home)
    mask = home / "left.png"
    Image.new("L", (4, 4), 255).save(mask)
    given = {
        "adapters": [home / "fox.safetensors"],
        "method": "regions",
        "options": {"regions": {"fox": mask}},
    }
    path = write_composition(parse_spec(CompositionSpec, given), home / "one.toml")
    assert 'fox = "left.png"' in path.read_text()
    moved = home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert read_composition("moved/one.toml").options.regions == {"fox": Path("moved/left.png")}
    assert (moved / "left.png").is_file()


def test_a_mask_in_memory_is_refused(duo: Path, tmp_path: Path) -> None:
    given = {
        "adapters": [duo / "fox.safetensors"],
        "method": "regions",
        "options": {"regions": {"fox": torch.ones(4, 4)}},
    }
    with pytest.raises(OutputError, match="mask of 'fox' is in memory"):
        write_composition(parse_spec(CompositionSpec, given), tmp_path / "one.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 2\n", "is a composition of version 2, this program reads version 1. Update this program"),
        ('method = "merge"\n', "says no version. Begin it with 'version = 1', or give settings"),
        ("version = true\n", "says no version"),
        ("version = 1\nbase = \n", "is not valid TOML: Invalid value (at line 2, column 8)"),
        ('version = 1\nmehtod = "klora"\n', "mehtod: unknown option. Did you mean 'method'?"),
        ('version = 1\nprompt = "a fox"\n', "prompt: unknown option."),
        (
            'version = 1\nadapters = ["fox.safetensors"]\n',
            "each is a table of its own, [[adapters]] with a path",
        ),
        ("version = 1\n[[adapters]]\nweight = 1\n", "adapters.0.path: is required"),
        (
            'version = 1\n[[adapters]]\npath = "a"\nweight = "much"\n',
            "adapters.0.weight: Input should be a valid",
        ),
        ('version = 1\n[[adapters]]\npath = "a"\nweight = nan\n', "adapters.0.weight: Input should be"),
        (
            'version = 1\n[[adapters]]\npath = "a"\n[[adapters]]\npath = "a"\n',
            "is given twice. Leave one out",
        ),
        ("version = 1\n[modifiers.cahce]\n", "unknown plan modifier 'cahce'. Did you mean 'cache'?"),
        ('version = 1\nmethod = "switch"\n[options]\nswitch_evry = 2\n', "Did you mean 'switch_every'?"),
        ("version = 1\noptions = 3\n", "options: is a table of its own, got 3"),
        ('version = 1\nmethod = "regions"\n[options.regions]\nrobot = 3\n', "regions.robot"),
        ('version = 1\nmethod = "regions"\n[options.regions]\nrobot = ["a.png"]\n', "regions.robot"),
    ],
)
def test_what_is_wrong_with_a_document_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "duo.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_composition(path)
    assert "duo.toml" in str(caught.value)


def test_a_missing_document_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the composition '.*none\.toml'"):
        read_composition(tmp_path / "none.toml")


def test_a_document_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "duo.toml"
    path.write_text("kept", encoding="utf-8")
    with pytest.raises(OutputError, match=r"exists\. Choose another output or give --overwrite"):
        write_composition(CompositionSpec(), path)
    assert path.read_text(encoding="utf-8") == "kept"
    write_composition(CompositionSpec(), path, overwrite=True)
    assert read_composition(path) == CompositionSpec()
    assert [each.name for each in tmp_path.iterdir()] == ["duo.toml"]
    with pytest.raises(OutputError, match=r"ends in \.toml"):
        write_composition(CompositionSpec(), tmp_path / "duo.txt")


def test_another_adapter_than_the_expected_one_is_told(
    composition: Callable[..., dict[str, Any]], duo: Path, tmp_path: Path
) -> None:
    shutil.copytree(duo, tmp_path / "own")
    uses = [{"path": str(tmp_path / "own" / f"{name}.safetensors")} for name in ("fox", "ink")]
    path = write_composition(
        parse_spec(CompositionSpec, composition(adapters=uses)), tmp_path / "own" / "duo.toml"
    )
    shutil.copyfile(duo / "ink.safetensors", tmp_path / "own" / "fox.safetensors")
    events: list[Event] = []
    studio.show_plan(PlanSpec(**read_composition(path).model_dump()), on_event=events.append)
    (message,) = (event.message for event in events)
    assert "fox.safetensors' is not the expected one" in message and "Choose the right file." in message


def test_a_picture_is_drawn_by_a_document_and_holds_the_composition(
    composition: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = parse_spec(CompositionSpec, composition(method="composite", options={"shares": {"ink": 2.0}}))
    path = write_composition(spec, tmp_path / "duo.toml")
    out = str(tmp_path / "out")
    words = ["generate", "--prompt", "a fox", "--composition", str(path), "--steps", "2", "--output", out]
    assert cli.main(words) == 0
    assert "expected" not in capsys.readouterr().err
    picture = tmp_path / "out" / "0000-0.png"
    assert cli.main(["compose", "--from", str(picture), "--output", str(tmp_path / "again.toml")]) == 0
    again = read_composition(tmp_path / "again.toml")
    assert (again.method, again.options) == (spec.method, spec.options)
    assert [use.weight for use in again.adapters] == [0.8, 0.5]
    # The picture knows the base it was drawn on, the document it was drawn by does not.
    assert set(again.expected_hashes) - set(read_composition(path).expected_hashes) == {spec.base}

    settings = parse_spec(GenerateSpec, {**again.model_dump(), "prompt": "a fox", "steps": 2})
    settings = settings.model_copy(update={"output": tmp_path / "more"})
    (result,) = studio.generate(settings)
    assert result.path is not None
    assert result.image.tobytes() == _pixels(picture)


def _pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB").tobytes()
