"""Many prompts: each picture is drawn once, alike in any batch, and listed; a run that ended goes on."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import studio
from studio import api
from studio.adapters.adapter import Adapter
from studio.batches.lines import Line, read_lines, wanted_pictures
from studio.batches.manifest import read_manifest
from studio.cli import main
from studio.errors import AdapterError, CompositionError, OutputError, SpecError, UsageError
from studio.png import read_spec
from studio.prompt_settings import settled
from studio.specs import BatchSpec, Event, GenerateSpec, parse_spec
from studio.workspace import workspace

LONG = "sea " * 30  # of the tiny tokenizer every letter is a token: two chunks
NAMES = ("a/dog", "b/dog", "ink")  # of adapters in the workspace


@pytest.fixture(scope="module")
def adapter(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an adapter that changes pictures much."""
    import torch

    from studio.adapters.kinds.lora import LoraChange

    pipe = studio.load_base(tiny_base, device="cpu")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    change = LoraChange.sample((32, 32), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("adapters") / "ink.safetensors"
    studio.save_adapter(Adapter("ink", "lora", {name: change}), path, format="diffusers", base=pipe)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\n\na fox --s 1\na cat --d 7 --n fog\n", encoding="utf-8")
    return path


def batch(base: str, prompts: Path, **values: Any) -> BatchSpec:
    given = {"steps": 2, "seeds": "1-2", "output": prompts.parent / "out", "device": "cpu", **values}
    return parse_spec(BatchSpec, {"base": base, "prompts": prompts, **given})


def drawn(spec: BatchSpec, **more: Any) -> tuple[list[str], Any]:
    """Return the names of the pictures that are drawn, and the result."""
    events: list[Event] = []
    result = api.draw_batch(spec, on_event=events.append, **more)
    return [event.path.name for event in events if event.kind == "picture" and event.path], result


def pixels(image: Image.Image) -> "np.ndarray[Any, np.dtype[np.int16]]":
    return np.asarray(image).astype(np.int16)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("1-4", (1, 2, 3, 4)),
        ("3, 1 ,5-6", (3, 1, 5, 6)),
        (["7", "1-2"], (7, 1, 2)),
        ([4, 2], (4, 2)),
        (5, (5,)),
    ],
    ids=str,
)
def test_seeds_are_numbers_and_ranges(given: Any, seeds: tuple[int, ...]) -> None:
    assert parse_spec(BatchSpec, {"prompts": "x", "seeds": given}).seeds == seeds


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("4-1", "'4-1' is no seed"),
        ("a", "no seed"),
        ("1,1", "stands twice"),
        ("", "no seed"),
        ([-1], "from 0"),
    ],
)
def test_seeds_that_mean_nothing_are_refused(given: Any, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_spec(BatchSpec, {"prompts": "x", "seeds": given})


def test_a_file_of_prompts_keeps_its_line_numbers(prompts: Path) -> None:
    assert read_lines(prompts) == [Line(3, "a fox --s 1"), Line(4, "a cat --d 7 --n fog")]
    prompts.write_text("# nothing\n\n", encoding="utf-8")
    with pytest.raises(UsageError, match="there is no prompt in"):
        read_lines(prompts)
    with pytest.raises(UsageError, match=r"cannot read the prompts in .*none.txt'"):
        read_lines(prompts.with_name("none.txt"))


def test_what_a_line_says_counts_for_it_alone() -> None:
    lines = [Line(1, "a fox"), Line(3, "a cat --d 7 --w 64 --h 128 --l 3 --s 9 --n fog")]
    found, problems = wanted_pictures(lines, {"steps": 4, "negative_prompt": "rain"}, [1, 2])
    assert problems == [] and [each.path.name for each in found] == ["0001-1.png", "0001-2.png", "0003-7.png"]
    first, _, own = (each.spec for each in found)
    assert (first.steps, first.negative_prompt, first.width) == (4, "rain", None)
    assert (own.steps, own.negative_prompt, own.width, own.height) == (9, "fog", 64, 128)
    assert (own.guidance_scale, own.prompt) == (3, "a cat")


def test_every_wrong_line_is_named_and_may_be_left_out(tiny_base: str, prompts: Path) -> None:
    prompts.write_text("a fox\na cat --w 65 --s no\na [b|c]\n<lora:ikn>\na dog\n", encoding="utf-8")
    with pytest.raises(SpecError) as raised:
        drawn(batch(tiny_base, prompts))
    text = str(raised.value)
    for words in (
        "line 2: width",
        "line 2: steps",
        "line 3: prompt: '[b|c]'",
        "line 4: prompt: there is no adapter",
    ):
        assert words in text
    assert not (prompts.parent / "out").exists()
    names, result = drawn(batch(tiny_base, prompts, skip_bad=True, seeds=0, steps=1))
    assert names == ["0001-0.png", "0005-0.png"] and len(result.left_out) == 4


@pytest.fixture
def switching(adapter: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a composition of two adapters in turns of two steps."""
    other = tmp_path / "other.safetensors"
    tensors = load_file(adapter)
    save_file({name: -tensor for name, tensor in tensors.items()}, other)
    return {"adapters": [adapter, other], "method": "switch", "options": {"switch_every": 2}}


def test_a_line_that_its_composition_cannot_draw_is_one_of_the_wrong_lines(
    tiny_base: str, prompts: Path, switching: dict[str, Any]
) -> None:
    prompts.write_text("a fox\na cat --s 2\na dog\n", encoding="utf-8")
    given = {"steps": 3, "seeds": 0, **switching}
    with pytest.raises(SpecError, match=r"line 2: switch_every=2 in a run of 2 steps lets only 'ink' act"):
        drawn(batch(tiny_base, prompts, **given))
    assert not (prompts.parent / "out").exists()
    names, result = drawn(batch(tiny_base, prompts, skip_bad=True, **given))
    assert names == ["0001-0.png", "0003-0.png"] and len(result.left_out) == 1
    # What is wrong with all of them is no line's fault.
    prompts.write_text("a fox --s 2\na cat --s 1\n", encoding="utf-8")
    with pytest.raises(CompositionError, match=r"^method 'klora' .* got 'ink' alone"):
        drawn(batch(tiny_base, prompts, adapters=switching["adapters"][:1], method="klora"))


def test_a_concept_that_a_line_lacks_is_said_with_its_number() -> None:
    lines = [Line(1, "a fox on a hill"), Line(4, "a cat")]
    clora = {"method": "clora", "options": {"concepts": {"ink": "fox"}}, "adapters": ["ink.safetensors"]}
    found, problems = wanted_pictures(lines, clora, [1])
    assert [each.number for each in found] == [1]
    assert problems[0].startswith('line 4: concepts: "fox" of \'ink\' is not in the prompt "a cat"')


def test_what_only_drawing_finds_wrong_with_a_line_is_said_with_its_number(
    tiny_base: str, prompts: Path, adapter: Path
) -> None:
    import torch

    wide = adapter.with_name("wide.safetensors")
    tensors = {
        name: torch.zeros(32, 8) if "up" in name else torch.zeros(8, 64) for name in load_file(adapter)
    }
    save_file(tensors, wide)
    prompts.write_text("a fox\na cat <lora:wide>\na dog --s 2\n", encoding="utf-8")
    given = {"seeds": 0, "steps": 1, "adapter_folder": adapter.parent}
    with pytest.raises(AdapterError, match=r"^line 2: .*wide.* Mend it, or leave it out with --skip-bad"):
        drawn(batch(tiny_base, prompts, **given))
    for names in (["0003-0.png"], []):
        found, result = drawn(batch(tiny_base, prompts, skip_bad=True, **given))
        assert found == names and [text[:7] for text in result.left_out] == ["line 2:"]


def test_a_batch_is_drawn_once_and_listed(tiny_base: str, prompts: Path) -> None:
    spec = batch(tiny_base, prompts, batch_size=2)
    names, result = drawn(spec)
    assert names == ["0003-1.png", "0003-2.png", "0004-7.png"]
    assert (result.wanted, result.drawn, result.kept, result.stopped) == (3, 3, 0, False)
    listed = read_manifest(spec.output)
    assert list(listed) == names and listed["0004-7.png"]["settings"]["negative_prompt"] == "fog"
    assert [(each["line"], each["prompt"], each["seed"]) for each in listed.values()] == [
        (3, "a fox", 1), (3, "a fox", 2), (4, "a cat", 7),
    ]  # fmt: skip
    assert read_spec(spec.output / "0003-1.png").steps == 1

    assert drawn(spec)[0] == []
    (spec.output / "0003-2.png").unlink()
    names, result = drawn(spec)
    assert names == ["0003-2.png"] and (result.drawn, result.kept) == (1, 2)
    assert len((spec.output / "manifest.jsonl").read_text().splitlines()) == 3  # the same bits, no new line


def test_pictures_with_other_settings_are_refused_or_drawn_anew(
    tiny_base: str, prompts: Path, adapter: Path
) -> None:
    given: dict[str, Any] = {"steps": 1, "adapters": [f"{adapter}:0.5"]}
    drawn(batch(tiny_base, prompts, **given))
    other = batch(tiny_base, prompts, **given, negative_prompt="rain")
    with pytest.raises(
        OutputError, match=r"2 of the pictures in .* 0003-1.png \(negative_prompt\), .*--overwrite"
    ):
        drawn(other)
    # What stays as it is, is not drawn: the second line has a negative prompt of its own.
    again = other.model_copy(update={"overwrite": True})
    assert drawn(again)[0] == ["0003-1.png", "0003-2.png"] and drawn(again)[0] == []
    assert len((other.output / "manifest.jsonl").read_text().splitlines()) == 3  # one for each picture
    assert read_manifest(other.output)["0003-1.png"]["settings"]["negative_prompt"] == "rain"

    (other.output / "0003-1.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"0003-1.png \(not drawn by this program, or edited\)"):
        drawn(other)


def test_an_adapter_that_has_changed_counts_as_another_setting(
    tiny_base: str, prompts: Path, adapter: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(adapter.read_bytes())
    spec = batch(tiny_base, prompts, adapters=[own], steps=1)
    drawn(spec)
    changed = bytearray(own.read_bytes())
    changed[-1] ^= 1
    own.write_bytes(changed)
    with pytest.raises(OutputError, match=r"0003-1.png \(another own.safetensors\)"):
        drawn(spec)


def test_what_was_drawn_before_a_stop_stays_and_the_same_run_goes_on(tiny_base: str, prompts: Path) -> None:
    spec = batch(tiny_base, prompts, steps=1)
    asked: list[int] = []
    names, result = drawn(spec, stop=lambda: bool(asked.append(1)) or len(asked) > 2)
    assert names == ["0003-1.png", "0003-2.png"] and result.stopped and result.drawn == 2
    assert list(read_manifest(spec.output)) == names
    # Killed between a picture and its line, and in the middle of a line.
    manifest = spec.output / "manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines()[0] + '\n{"file": "0003-')
    names, result = drawn(spec)
    assert names == ["0004-7.png"] and not result.stopped
    assert sorted(read_manifest(spec.output)) == ["0003-1.png", "0003-2.png", "0004-7.png"]


def test_a_picture_is_the_same_in_any_batch_and_by_its_file_alone(tiny_base: str, tmp_path: Path) -> None:
    texts = ["a fox", LONG, "a (red:1.4) cat", "a dog --s 1"]
    given: dict[str, Any] = {"base": tiny_base, "steps": 2, "device": "cpu"}
    together = list(studio.generate_batch(texts, batch_size=4, output=tmp_path / "out", **given))
    assert sorted(result.prompt for result in together) == sorted(["a fox", LONG, "a (red:1.4) cat", "a dog"])
    alone = {result.prompt: result for text in texts for result in studio.generate_batch([text], **given)}
    for result in together:
        # One level: sums of another batch size round differently.
        assert np.abs(pixels(result.image) - pixels(alone[result.prompt].image)).max() <= 1
    assert result.path is not None
    (again,) = studio.generate(
        read_spec(result.path).model_copy(update={"output": tmp_path, "device": "cpu"})
    )
    assert np.abs(pixels(again.image) - pixels(result.image)).max() <= 1
    assert list(studio.generate_batch(texts, output=tmp_path / "out", **given)) == []


def test_progress_is_that_of_all_groups_with_the_speed(tiny_base: str, prompts: Path) -> None:
    events: list[Event] = []
    api.draw_batch(batch(tiny_base, prompts), on_event=events.append)
    steps = [(event.step, event.total) for event in events if event.kind == "progress"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    pictures = [(event.step, event.total) for event in events if event.kind == "picture"]
    assert pictures == [(1, 3), (2, 3), (3, 3)]
    assert [event.values for event in events if event.kind == "progress"][-1]["images/s"] > 0


def settle(prompt: str, **values: Any) -> GenerateSpec:
    return settled(parse_spec(GenerateSpec, {"prompt": prompt, **values}))


def test_a_tag_is_an_adapter_of_the_workspace_or_a_folder(adapter: Path, tmp_path: Path) -> None:
    kept = workspace().adapters
    for name in NAMES:
        (kept / name).parent.mkdir(exist_ok=True)
        (kept / f"{name}.safetensors").touch()
    spec = settle("a <lora:ink:0.5> fox <lora:a/dog>")
    assert spec.prompt == "a fox"
    assert [(use.path, use.weight) for use in spec.adapters] == [
        (kept / "ink.safetensors", 0.5),
        (kept / "a" / "dog.safetensors", 1.0),
    ]
    (use,) = settle("<lora:ink:2> a fox", adapter_folder=adapter.parent).adapters
    assert use.path == adapter
    assert settle("<lora:ink:2> (a)", raw_prompt=True).prompt == "<lora:ink:2> (a)"


@pytest.mark.parametrize(
    ("given", "weight", "table"),
    [
        ("unet=0.8:te=0.4", 0.8, "BASE:0.5"),
        ("te=0:unet=0.8", 0.8, "BASE:0.0"),
        ("unet=0:te=0.4", 0.4, "unet:0.0"),
    ],
)
def test_weights_of_the_text_encoders_are_block_weights(
    adapter: Path, given: str, weight: float, table: str
) -> None:
    flag = parse_spec(
        GenerateSpec, {"prompt": "a", "adapters": f"{adapter}:{given}", "modifiers": "cache:interval=2"}
    )
    tag = settle(f"a <lora:ink:{given}>", adapter_folder=adapter.parent, modifiers="cache:interval=2")
    for spec in (flag, tag):
        assert [(use.path, use.weight) for use in spec.adapters] == [(adapter, weight)]
        assert list(spec.modifiers) == ["cache", "blocks"]
        assert spec.modifiers["blocks"].model_dump() == {"weights": {"ink": table}}


def test_text_encoders_and_unet_get_the_weights_that_are_asked_for(tiny_base: str, tmp_path: Path) -> None:
    import torch

    from studio.adapters.kinds.lora import LoraChange
    from studio.adapters.parameters import components_of, find_parameter
    from studio.drawing import composed

    pipe = studio.load_base(tiny_base, device="cpu")
    names = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.weight",
    )
    generator = torch.Generator().manual_seed(1)
    changes = {name: LoraChange.sample((32, 32), generator=generator) for name in names}
    path = tmp_path / "ink.safetensors"
    studio.save_adapter(
        Adapter("ink", "lora", changes), path, format="diffusers", base=pipe, dtype=torch.float32
    )
    own = {name: find_parameter(components_of(pipe), name).detach().double() for name in names}
    ways: tuple[dict[str, Any], ...] = ({}, {"how": "svd"}, {"modifiers": "pin:adapters=ink"})
    asked = (("unet=0.8:te=-0.3", (0.8, -0.3)), ("unet=0:te=0.7", (0, 0.7)))
    for (given, weights), way in itertools.product(asked, ways):
        spec = parse_spec(GenerateSpec, {"prompt": "a", "adapters": f"{path}:{given}", **way})
        with composed(pipe, spec):
            for name, weight in zip(names, weights, strict=True):
                found = find_parameter(components_of(pipe), name).detach().double()
                delta = changes[name].delta(own[name].float(), weight=1.0).double()
                torch.testing.assert_close(found, own[name] + weight * delta, rtol=0, atol=1e-6)  # fp32


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"adapters": "ink.safetensors:te=0.5"}, "must be PATH:WEIGHT or PATH:unet=WEIGHT:te=WEIGHT"),
        (
            {"adapters": "ink.safetensors:unet=1:te=0.5", "modifiers": "blocks:weights.ink=M00:1"},
            "'ink' has block weights, too. Say there what the text encoders' is, as BASE",
        ),
        ({"adapters": "ink.safetensors:unet=99:te=1"}, "weight: .*got 99"),
    ],
)
def test_two_weights_that_cannot_be_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_spec(GenerateSpec, {"prompt": "a", **values})


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("<lora:inc>", r"there is no adapter 'inc' in .*Did you mean 'ink'\?.*--adapter-folder"),
        ("<lora:dog>", r"several adapters are called 'dog': .*Name the folder, too, as in <lora:a/dog:1>"),
        ("<lora:ink> <lora:ink>", "'ink' is named twice"),
        ("<lora:../ink>", "there is no adapter"),
        ("a fox --n <lora:ink>", "not in the negative prompt"),
        ("a --s 0", "steps: "),
        ("<lora:ink:99>", r"adapters.weight: .*got 99"),
    ],
)
def test_a_prompt_that_asks_for_what_is_not_there_is_refused(prompt: str, match: str) -> None:
    kept = workspace().adapters
    for name in NAMES:
        (kept / name).parent.mkdir(exist_ok=True)
        (kept / f"{name}.safetensors").touch()
    with pytest.raises(SpecError, match=match):
        settle(prompt)


def test_an_adapter_at_the_top_is_meant_by_its_name_alone() -> None:
    kept = workspace().adapters
    for name in ("dog", "a/dog", "b/dog"):
        (kept / name).parent.mkdir(exist_ok=True)
        (kept / f"{name}.safetensors").touch()
    assert [use.path for use in settle("<lora:dog>").adapters] == [kept / "dog.safetensors"]
    assert [use.path for use in settle("<lora:a/dog>").adapters] == [kept / "a" / "dog.safetensors"]


def test_a_tag_draws_what_the_adapter_draws(tiny_base: str, adapter: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": tiny_base, "steps": 1, "device": "cpu"}

    def draw(prompt: str, name: str, **values: Any) -> Any:
        asked = {"prompt": prompt, "output": tmp_path / name, **given, **values}
        return api.generate(parse_spec(GenerateSpec, asked))[0]

    tagged = draw("a fox <lora:ink:0.7>", "tag", adapter_folder=adapter.parent)
    listed = draw("a fox", "listed", adapters=[f"{adapter}:0.7"])
    assert (pixels(tagged.image) == pixels(listed.image)).all() and tagged.infotext == listed.infotext
    assert tagged.infotext.startswith("a fox <lora:ink:0.7>\n")
    assert (pixels(tagged.image) != pixels(draw("a fox", "plain").image)).any()
    raw = draw(r"a (fox)", "raw", raw_prompt=True)
    assert raw.infotext.startswith("a \\(fox\\)\n")


def test_the_command_draws_a_file_of_prompts(
    tiny_base: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prompts.parent / "o"
    words: Sequence[str] = [
        "--base",
        tiny_base,
        "--steps",
        "1",
        "--seeds",
        "1-2",
        "--batch",
        "2",
        "--device",
        "cpu",
    ]
    command = ["generate", "--prompts", str(prompts), *words, "--output", str(output)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output / "manifest.jsonl")
    assert "3 of 3 pictures drawn, 0 were there" in said.err and "images/s" in said.err
    assert main(command) == 0 and "0 of 3 pictures drawn, 3 were there" in capsys.readouterr().err
    assert main(["generate", "--prompts", str(prompts), "--prompt", "x"]) == 2
    assert "no --prompt beside it. Give one of the two." in capsys.readouterr().err
    assert json.loads((output / "manifest.jsonl").read_text().splitlines()[0])["file"] == "0003-1.png"
