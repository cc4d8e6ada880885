"""Facts are kept whole or not at all, and found again by what they were measured on."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.composition import facts
from studio.registry import KINDS

VALUE = {"bands": [0.1, 1e-300, 3.0], "layer": {"64": 0.1 + 0.2}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path))
    return tmp_path


def only_file(home: Path) -> Path:
    (path,) = (home / "facts").rglob("*.*")
    return path


def test_what_was_put_is_got_to_the_last_bit(home: Path) -> None:
    assert facts.get("spectrum", "a") is None
    facts.put("spectrum", "a", VALUE)
    facts.put("spectrum", "b", {"x": 1})
    assert facts.get("spectrum", "a") == VALUE
    assert facts.get("spectrum", "c") is None
    assert facts.get("sums", "a") is None


def test_a_later_fact_takes_the_place_of_the_former(home: Path) -> None:
    facts.put("spectrum", "a", {"x": 1})
    facts.put("spectrum", "a", VALUE)
    assert facts.get("spectrum", "a") == VALUE
    assert only_file(home).suffix == ".json"


@pytest.mark.parametrize("damage", ["empty", "half", "number", "list", "version", "key", "binary"])
def test_a_damaged_fact_is_none(damage: str, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts.put("spectrum", "a", VALUE)
    path = only_file(home)
    text = path.read_text()
    document = json.loads(text)
    broken = {
        "empty": "",
        "half": text[: len(text) // 2],
        "number": text.replace("0.1", "0.2"),
        "list": "[1]",
        "version": json.dumps({**document, "version": facts.VERSION + 1}),
        "key": json.dumps({**document, "key": "b"}),
    }
    path.write_bytes(b"\xff\xfe\x00" if damage == "binary" else broken[damage].encode())
    with caplog.at_level(logging.WARNING):
        assert facts.get("spectrum", "a") is None
    assert "measured anew" in caplog.text
    facts.put("spectrum", "a", VALUE)
    assert facts.get("spectrum", "a") == VALUE


def test_an_interrupted_write_leaves_the_former_fact(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts.put("spectrum", "a", VALUE)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", interrupted)
        facts.put("spectrum", "a", {"x": 1})
    assert facts.get("spectrum", "a") == VALUE
    assert only_file(home).suffix == ".json"


def test_numbers_that_are_not_finite_are_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        facts.put("spectrum", "a", {"x": float("nan")})
    assert facts.get("spectrum", "a") is None


def test_a_workspace_that_cannot_be_written_only_warns(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("STUDIO_HOME", str(home / "file"))
    facts.put("spectrum", "a", VALUE)
    assert facts.get("spectrum", "a") is None
    assert "cannot be kept" in caplog.text and "cannot be read" in caplog.text


@pytest.mark.parametrize("kind", KINDS.names())
def test_the_hash_of_an_adapter_is_that_of_its_numbers(kind: str) -> None:
    def make(seed: int, shape: tuple[int, ...] = (8, 6)) -> Adapter:
        change = KINDS[kind].sample(shape, generator=torch.Generator().manual_seed(seed))
        return Adapter("x", kind, {"unet.a.weight": change})

    one = make(1)
    digest = facts.content_hash(one)
    assert facts.content_hash(replace(make(1), name="y", metadata={"z": "1"})) == digest
    others = [
        make(2),
        replace(one, changes={"unet.b.weight": one.changes["unet.a.weight"]}),
        replace(one, changes={}),
        replace(one, tokens={"<t>": {"text_encoder": torch.ones(1, 4)}}),
    ]
    assert len({digest, *map(facts.content_hash, others)}) == 5
    # As a base has it that computes the layer by a convolution.
    fitted = {name: change.fitted((8, 6, 1, 1)) for name, change in one.changes.items()}
    assert facts.content_hash(replace(one, changes=fitted)) == digest


def test_the_hash_sees_scales_shapes_and_types() -> None:
    change = KINDS["lora"].sample((8, 8), generator=torch.Generator().manual_seed(0))
    variants = [
        change,
        replace(change, alpha=change.alpha * 2),
        replace(change, down=change.down.reshape(3, 4, 2)),
        replace(change, down=change.down.bfloat16()),
    ]
    hashes = {facts.content_hash(Adapter("x", "lora", {"unet.a.weight": each})) for each in variants}
    assert len(hashes) == 4
    strided = replace(change, down=change.down.T.contiguous().T)
    assert facts.content_hash(Adapter("x", "lora", {"unet.a.weight": strided})) in hashes
