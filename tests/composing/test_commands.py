"""``studio compose`` in its modes, compositions in ``studio generate``, and what each says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import studio
from studio import cli
from studio.composition.cost import plan_cost, unet_macs
from studio.composition.methods.merge import Merge
from studio.composition.modifiers.cache import Cache
from studio.specs import BatchSpec, GenerateSpec, MethodSpec, TrainSpec, parse_spec
from studio.specs.composing import BakeSpec, DocumentSpec, PlanSpec

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    base: str, duo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return a function: words after ``studio`` -> exit code, standard output, standard error.

    FOX and INK stand for the adapters' files, BASE for the base.
    """
    monkeypatch.chdir(tmp_path)
    files = {"FOX": f"{duo / 'fox.safetensors'}", "INK": f"{duo / 'ink.safetensors'}", "BASE": base}

    def call(*words: str) -> tuple[int, str, str]:
        given = []
        for word in words:
            for name, file in files.items():
                word = word.replace(name, file)
            given.append(word)
        code = cli.main(given)
        return code, *capsys.readouterr()

    return call


PAIR = ("--adapter", "FOX:0.8", "--adapter", "INK:0.5")


def test_a_composition_is_written_planned_compared_and_baked(run: Run, tmp_path: Path) -> None:
    words = ("--method", "switch", "--switch-every", "1", "--with", "cache:interval=2")
    assert run("compose", "--base", "BASE", *PAIR, *words, "--output", "duo.toml")[:2] == (0, "duo.toml\n")
    code, out, err = run("compose", "--plan", "duo.toml", "--steps", "6", "--picture", "plan.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split() == ["fox", "0.80", "0.00"] * 1 + ["0.80", "0.00"] * 2
    assert lines[-1] == "plan.png" and (tmp_path / "plan.png").is_file()

    words = ("--from", "duo.toml", "--prompt", "a fox", "--steps", "2", "--seeds", "1-2")
    code, out, err = run("compose", "--compare", "merge,switch", *words, "--options", "klora:alpha=2")
    assert code == 0 and out.splitlines()[-2:] == ["compare.png", "compare.json"]
    document = json.loads((tmp_path / "compare.json").read_text())
    # Options and modifiers of the document count for its method, flags for theirs.
    assert document["spec"]["method_options"].keys() == {"klora"}
    assert document["spec"]["modifiers"]["cache"]["interval"] == 2
    assert [row["method"] for row in document["rows"]] == ["base", "merge", "switch"]

    code, out, err = run(
        "compose", "--bake", "duo.toml", "--steps", "4", "--max-rank", "2", "--output", "one.safetensors"
    )
    assert code == 0 and out.splitlines()[-1] == "one.safetensors"
    assert out.startswith("weights: relative distance 0.")
    assert run("inspect", "one.safetensors")[0] == 0


def test_profile_measures_the_adapters_of_a_composition(run: Run) -> None:
    assert run("compose", "--base", "BASE", *PAIR, "--method", "cmlora", "--output", "duo.toml")[0] == 0
    code, out, _ = run("compose", "--profile", "duo.toml", "--device", "cpu")
    *rows, flags = out.splitlines()
    assert code == 0 and {row.split()[0] for row in rows} == {"fox", "ink"}
    assert run("compose", "--plan", "duo.toml", *flags.split())[0] == 0
    code, _, err = run("compose", "--plan", "duo.toml")
    assert code == 1 and "--measure loads the base" in err


def test_generate_takes_a_composition_and_flags_win(run: Run, tmp_path: Path) -> None:
    words = ("--method", "composite", "--with", "cache:interval=2", "--output", "duo.toml")
    assert run("compose", "--base", "BASE", *PAIR, *words)[0] == 0
    prompt = ("generate", "--prompt", "a fox", "--steps", "4", "--composition", "duo.toml")
    assert run(*prompt, "--output", "a")[0] == 0
    assert run(*prompt, "--output", "b", "--with", "none", "--method", "merge")[0] == 0
    first, second = (studio.png.read_spec(tmp_path / name / "0000-0.png") for name in "ab")  # type: ignore[attr-defined]
    assert first.method == "composite" and list(first.modifiers) == ["cache"]
    assert second.method == "merge" and not second.modifiers
    assert [use.weight for use in second.adapters] == [0.8, 0.5]


def test_a_drawing_with_a_cache_says_what_it_cost(
    composition: Callable[..., dict[str, Any]], short_sd: Callable[[], Any], tmp_path: Path, run: Run
) -> None:
    options = {"interval": 3, "full_first": 1, "full_last": 1}
    fields = composition(prompt="a fox", steps=8, modifiers={"cache": options}, output=tmp_path, count=2)
    results = studio.generate(parse_spec(GenerateSpec, {**fields, "batch_size": 2}))
    plan = Cache(Cache.Options(**options)).modify(Merge().prepare({}, {}), {}, {})
    wanted = plan_cost(plan, 8, unet_macs(short_sd().unet, 8, 8, plan.cut))
    # Whole are steps 1, 4, 7 and 8.
    assert wanted.cached_share == 0.5
    for result in results:
        assert result.cost == wanted and result.path is not None
        with Image.open(result.path) as image:
            facts = json.loads(image.info["studio"])["facts"]
        assert (facts["macs"], facts["cached_share"]) == (wanted.total, 0.5)
        assert studio.png.read_spec(result.path).steps == 8  # type: ignore[attr-defined]
    (plain,) = studio.generate(
        parse_spec(GenerateSpec, {**fields, "modifiers": {}, "count": 1, "overwrite": True})
    )
    assert plain.cost is None
    skipping = {"skip-guidance": {"start": 0.5}}
    (halved,) = studio.generate(
        parse_spec(GenerateSpec, {**fields, "modifiers": skipping, "count": 1, "overwrite": True})
    )
    # Half of the steps evaluate one row instead of two.
    assert halved.cost and halved.cost.ratio == 0.75 and halved.cost.cached_share == 0
    words = ("generate", "--base", "BASE", "--prompt", "x", "--steps", "8", "--output", "c")
    assert "denoiser: " not in run(*words)[2]
    _, _, err = run(*words, "--overwrite", "--with", "cache:interval=3,full-first=1,full-last=1")
    assert f"{wanted.ratio:.2f} x the base's; 50% of the evaluations from kept features" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("compose --adapter FOX:much --output x.toml", 2, "fox.safetensors' must be a number, got 'much'"),
        ("compose --adapter FOX:nan --output x.toml", 2, "fox.safetensors' must be a number, got 'nan'"),
        ("compose --adapter FOX --adapter FOX:0.5 --output x.toml", 2, "is given twice. Leave one out"),
        (
            "compose --adapter FOX --adapter ./link/fox.safetensors --output x.toml",
            2,
            "is given twice, also as",
        ),
        ("merge FOX ./link/fox.safetensors", 2, "is given twice, also as"),
        ("compose --plan none.toml", 2, "cannot read the composition 'none.toml'"),
        ("compose --plan --bake", 2, "not allowed with argument"),
        ("compose --plan --adapter none.safetensors", 1, "none.safetensors does not exist"),
        ("compose --plan --adapter FOX --adapter INK --method switch --steps 5", 1, "lets only 'fox' act"),
        ("compose --plan --method klora", 1, "method 'klora' got no adapters"),
        ("compose --plan --method klora --adapter FOX --content ink", 1, "content: unknown adapter 'ink'"),
        (
            "compose --plan --adapter FOX --with cahce",
            2,
            "unknown plan modifier 'cahce'. Did you mean 'cache'",
        ),
        ("compose --plan --adapter FOX --with cache:intrval=2", 2, "intrval: unknown option. Did you mean"),
        ("compose --compare merge --adapter FOX", 2, "prompt: is required"),
        ("compose --compare mrge --prompt x", 2, "unknown composition method 'mrge'. Did you mean 'merge'"),
        ("compose --bake --adapter FOX", 2, "output: is required"),
        ("compose --profile", 2, "adapters: is required"),
        ("generate --prompt x --base BASE --adapter FOX --adapter FOX", 2, "is given twice"),
        (
            "generate --prompt x --base BASE --adapter FOX --adapter INK --method switch --steps 4",
            1,
            "switch_every=5 in a run of 4 steps lets only 'fox' act",
        ),
        ("generate --prompt x --composition none.toml", 2, "cannot read the composition 'none.toml'"),
    ],
)
def test_bad_input_is_one_message_with_the_way_out(
    words: str, code: int, message: str, run: Run, duo: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(duo)
    got, out, err = run(*words.split())
    assert (got, out) == (code, "") and message in err
    assert err.startswith("error: ") and "Traceback" not in err


def test_a_newer_composition_is_refused_wherever_it_is_given(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text("version = 2\n")
    for words in (
        "compose --plan",
        "compose --bake",
        "compose --compare merge --from",
        "generate --composition",
    ):
        code, _, err = run(*words.split(), "new.toml")
        assert code == 2 and "is a composition of version 2, this program reads version 1. Update" in err


@pytest.mark.parametrize("spec_type", [TrainSpec, GenerateSpec, BatchSpec, DocumentSpec, PlanSpec, BakeSpec])
def test_no_option_of_a_method_hides_a_field(spec_type: type[MethodSpec]) -> None:
    for method in spec_type.registry.names():
        options = spec_type.registry[method].Options.model_fields
        assert not options.keys() & spec_type.model_fields.keys(), method
