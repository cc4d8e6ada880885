import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import studio
from studio import cli
from studio.block_probe.prompt_pairs import STARTER_WORDS, prompt_pairs
from studio.block_probe.table import ALL, NONE, Effect, Look, effects
from studio.errors import OutputError, SpecError, UsageError
from studio.models.blocks import attention_blocks
from studio.specs import Event, ProbeSpec, parse_spec


def spec(base: str, output: Path, **values: Any) -> ProbeSpec:
    given = {"base": base, "pairs": 1, "steps": 2, "device": "cpu", "output": output}
    return ProbeSpec.model_validate(given | values)


@pytest.fixture(scope="module")
def tiny_base(tiny_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny SD 1.x base model."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_reader(tiny_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the folder of a base in which one block alone hears the prompt, and that block's name."""
    pipe, reader = tiny_sd(), "up_blocks.1.attentions.1"
    for name, block in attention_blocks(pipe.unet).items():
        if name != reader:
            for layer in block.transformer_blocks:
                for parameter in layer.attn2.to_out[0].parameters():
                    torch.nn.init.zeros_(parameter)
    folder = tmp_path_factory.mktemp("base") / "one_reader"
    pipe.save_pretrained(folder, safe_serialization=True)
    return str(folder), reader


def test_a_base_with_one_block_that_hears_the_prompt_shows_that_block(
    one_reader: tuple[str, str], tmp_path: Path
) -> None:
    base, reader = one_reader
    report = studio.probe(spec(base, tmp_path, pairs=2, batch_size=3))
    found = {row.name: row.effects for row in report.rows}
    assert len(found) == 2 + 16 and list(found)[:2] == [NONE, ALL]
    for name, by_kind in found.items():
        for effect in by_kind.values():
            whole = 1.0 if name in (ALL, reader) else 0.0
            assert (effect.picture, effect.prediction) == (whole, whole), name
            assert (effect.shown, effect.kept, effect.clip) == (None, None, None)


def test_table_grid_and_bars_are_written(tiny_base: str, tmp_path: Path) -> None:
    events: list[Event] = []
    report = studio.probe(spec(tiny_base, tmp_path / "new", steps=1), on_event=events.append)
    table = json.loads(report.table.read_text())
    assert [row["name"] for row in table["rows"]] == [row.name for row in report.rows]
    assert [pair["kind"] for pair in table["pairs"]] == ["content", "style"]
    assert table["spec"]["pairs"] == 1 and table["base_fingerprint"] and "output" not in table["spec"]
    steps = [event.step for event in events if event.kind == "progress"]
    assert steps == list(range(2, 2 * 18 + 1, 2)) and events[-1].kind == "finished"
    assert all(row.seconds > 0 for row in report.rows)
    grid, bars = Image.open(report.grid), Image.open(report.bars)
    assert grid.height > 18 * 90 and bars.width > 400
    # A row without pictures or bars would be white there.
    assert (np.asarray(grid.convert("L"))[:, 260:] < 250).any(axis=1).mean() > 0.9
    words = "\n".join(report.lines())
    assert "content" in words and "style" in words and words.count("\n") == 1 + len(report.rows)


def test_a_group_is_read_together(one_reader: tuple[str, str], tmp_path: Path) -> None:
    base, reader = one_reader
    groups = (f"mid_block+{reader}", "down_blocks+mid_block.attentions.0")
    report = studio.probe(spec(base, tmp_path, groups=groups))
    found = {row.name: row.effects["style"].prediction for row in report.rows}
    assert found == {NONE: 0.0, ALL: 1.0, groups[0]: 1.0, groups[1]: 0.0}
    with pytest.raises(UsageError, match=r"groups: the base has no attention block 'up_blocks\.0'"):
        studio.probe(spec(base, tmp_path, groups=("up_blocks.0",), overwrite=True))


def test_it_works_on_sdxl(tiny_sdxl: Callable[[], Any], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_sdxl().save_pretrained(folder, safe_serialization=True)
    report = studio.probe(spec(str(folder), tmp_path / "out", steps=1))
    found = {row.name: row.effects["content"] for row in report.rows}
    assert len(found) == 2 + 11
    assert all(effect.prediction > 0 for name, effect in found.items() if name != NONE)
    assert found[ALL].prediction == found[ALL].picture == 1.0


def test_on_the_embedded_base_the_evaluator_says_what_is_shown(tmp_path: Path) -> None:
    from studio.assets.builder.evaluator import judge

    group = "up_blocks.3.attentions.0+up_blocks.3.attentions.2"
    report = studio.probe(spec("starter", tmp_path, steps=2, groups=(group,), batch_size=1))
    pairs = json.loads(report.table.read_text())["pairs"]
    for pair in pairs:
        for row, prompt in ((NONE, pair["own"]["prompt"]), (ALL, pair["other"]["prompt"])):
            (drawn,) = studio.generate_batch([prompt], seeds=[pair["seed"]], steps=2, device="cpu")
            (verdict,) = judge([drawn.image])
            seen = verdict.subject if pair["kind"] == "content" else verdict.style
            assert pair["seen"][row] == seen
    style = next(row for row in report.rows if row.name == ALL).effects["style"]
    assert style.shown == float(pairs[1]["seen"][ALL] == pairs[1]["other"]["style"])


def test_shares_and_ratios_are_over_the_pairs_of_a_kind() -> None:
    pairs = prompt_pairs(2, words=STARTER_WORDS, seed=0)

    def looks(along: list[float], change: list[float], seen: list[str], lean: list[float]) -> list[Look]:
        return [Look(*values) for values in zip(along, change, seen, lean, strict=True)]

    own, other = ([getattr(pair, side).named(pair.kind) for pair in pairs] for side in ("own", "other"))
    table = {
        NONE: looks([0] * 4, [0] * 4, own, [0.1] * 4),
        ALL: looks([1, 3, 2, 2], [4, 12, 1, 1], other, [0.5] * 4),
        "x": looks([1, 0, -1, 0], [1, 3, 1, 1], [other[0], own[1], "robot", other[3]], [0.2, 0.4, 0.1, 0.1]),
    }
    found = effects(table, pairs, "x")
    assert found["content"] == Effect(0.5, 0.5, pytest.approx(0.2), 0.25, 0.5)
    assert found["style"] == Effect(0.5, 0.0, pytest.approx(0.0), -0.25, 1.0)
    assert effects(table, pairs, ALL)["style"] == Effect(1.0, 0.0, pytest.approx(0.4), 1.0, 1.0)
    # A base that does not read its prompt has nothing to divide by.
    still = {**table, ALL: looks([0] * 4, [0] * 4, own, [0.1] * 4)}
    assert effects(still, pairs, ALL)["style"] == Effect(0.0, 1.0, 0.0, 0.0, 0.0)


def test_a_table_that_is_there_is_kept(tiny_base: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text("mine")
    with pytest.raises(OutputError, match=r"probe\.json' exists\. Choose another name or give --overwrite"):
        studio.probe(spec(tiny_base, tmp_path))
    assert (tmp_path / "probe.json").read_text() == "mine"


def test_the_command_prints_the_table(
    one_reader: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, reader = one_reader
    words = f"probe --base {base} --pairs 1 --steps 1 --output {tmp_path} --group {reader} --device cpu"
    assert cli.main(words.split()) == 0
    out = capsys.readouterr().out
    assert f"{reader}      1.000      1.000" in out and str(tmp_path / "grid.png") in out
    with pytest.raises(SpecError, match=r"pairs: .* got '0'"):
        parse_spec(ProbeSpec, {"pairs": "0"})
