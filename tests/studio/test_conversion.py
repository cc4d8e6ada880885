"""`studio convert` and `studio inspect` on sparse changes: every way out of our own format."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from studio import cli
from studio.adapters.adapter import Adapter
from studio.adapters.bank import WeightBank
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.kinds.sparse import SparseChange
from studio.adapters.origin import origin_facts
from studio.adapters.parameters import canonical_names, components_of, find_parameter
from studio.models.base import load_base

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pipe(tiny_base: str) -> Any:
    return load_base(tiny_base, device="cpu", precision="fp32")


@pytest.fixture
def style(tiny_base: str, pipe: Any, tmp_path: Path) -> Path:
    """Return our own file of a change of a few entries of every parameter of the UNet."""
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: SparseChange.sample(shape, generator=generator)
        for name, shape in canonical_names({"unet": pipe.unet}).items()
    }
    rule = {"threshold": 0.002, "quantile": None}
    metadata = {**origin_facts(pipe), "ss_base_model_version": "sd_v1", "studio.sara": json.dumps(rule)}
    adapter = Adapter("style", "sparse", changes, metadata=metadata)
    return save_adapter(adapter, tmp_path / "style.safetensors", format="sara")


@pytest.fixture
def convert(tiny_base: str, style: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str, file: Path = style, base: str = tiny_base) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["convert", str(file), "--base", base, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _merged(pipe: Any, adapter: Adapter, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    components = components_of(pipe)
    with WeightBank(components, adapter.changes) as bank:
        bank.apply({name: [(change, 1.0)] for name, change in adapter.changes.items()})
        return {
            name: find_parameter(components, name).detach().to(dtype, copy=True)
            for name in canonical_names(components)
        }


def test_kohya_file_holds_the_changes_in_full_and_says_how_large_it_gets(
    convert: Run, style: Path, pipe: Any, tmp_path: Path
) -> None:
    output = tmp_path / "dense.safetensors"
    code, out, err = convert("--output", str(output), "--format", "kohya")
    assert code == 0 and out.strip() == str(output)
    sparse, dense = load_adapter(style, base=pipe), load_adapter(output, base=pipe)
    count = sum(math.prod(change.shape) for change in sparse.changes.values())
    assert f"every entry of {len(sparse.changes)} parameters: about {4 * count / 1e6:.1f} MB" in err
    assert output.stat().st_size == pytest.approx(4 * count, rel=0.05)  # The rest is the header.
    wanted, got = _merged(pipe, sparse), _merged(pipe, dense)
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_rounding_that_matters_is_measured(convert: Run, pipe: Any, tmp_path: Path) -> None:
    layer = "unet.mid_block.resnets.0.conv1.weight"
    small = SparseChange(
        torch.tensor([0, 5], dtype=torch.int32), torch.tensor([1e-7, 1.3e-7]), (32, 32, 3, 3)
    )
    file = save_adapter(Adapter("a", "sparse", {layer: small}), tmp_path / "a.safetensors", format="sara")
    values = small.values.double()
    lost = float((values - values.half().double()).norm() / values.norm())
    code, _, err = convert(
        "--output", str(tmp_path / "b.safetensors"), "--format", "sara", "--precision", "fp16", file=file
    )
    assert code == 0 and f"rounding to torch.float16 loses {lost:.1%} of the change" in err and lost > 0.05
    code, _, err = convert("--output", str(tmp_path / "c.safetensors"), "--format", "sara", file=file)
    assert code == 0 and "loses" not in err


def test_low_rank_file_is_for_diffusers_and_says_what_it_loses(
    convert: Run, tiny_base: str, pipe: Any, style: Path, tmp_path: Path
) -> None:
    output = tmp_path / "rank.safetensors"
    code, _, err = convert("--output", str(output), "--rank", "4")
    assert code == 0
    vectors = [change for change in load_adapter(style, base=pipe).changes.values() if len(change.shape) == 1]
    assert "relative residual (Frobenius) 0." in err and "median" in err and "worst" in err
    assert f"left out: {len(vectors)} parameters" in err
    assert "rank 4, relative residual 0." in read_header(output).metadata["studio.extracted"]
    theirs = load_base(tiny_base, device="cpu", precision="fp32")
    theirs.load_lora_weights(tmp_path, weight_name=output.name, use_safetensors=True)
    assert theirs.get_active_adapters()
    code, _, err = convert("--output", str(tmp_path / "no.safetensors"))
    assert code == 1 and "diffusers reads LoRA and DoRA only" in err and "studio convert --into-base" in err


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("fp16", torch.float16)])
def test_merged_model_is_what_the_bank_makes(
    convert: Run, style: Path, pipe: Any, tmp_path: Path, precision: str | None, dtype: torch.dtype
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "merged"
    code, out, err = convert("--into-base", str(folder), *(["--precision", precision] if precision else []))
    assert (code, out.strip()) == (0, str(folder)) and "Writing" not in err
    theirs = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    wanted, components = _merged(pipe, load_adapter(style, base=pipe), dtype), components_of(theirs)
    assert all(torch.equal(find_parameter(components, name), tensor) for name, tensor in wanted.items())
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []
    code, _, err = convert("--into-base", str(folder))
    assert code == 1 and "exists. Give the name of a folder to be made" in err


def test_failed_merge_leaves_nothing(convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    before = set(tmp_path.iterdir())
    code, _, err = convert("--into-base", str(tmp_path / "merged"))
    assert code == 1 and "merged cannot be written: No space left on device. Free some space" in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words", [["--format", "kohya"], ["--rank", "0"], ["--dense"], ["--overwrite"]], ids=" ".join
)
def test_what_says_nothing_about_a_whole_model_is_refused(
    convert: Run, tmp_path: Path, words: list[str]
) -> None:
    code, _, err = convert("--into-base", str(tmp_path / "merged"), *words)
    assert code == 2 and "Leave out --format, --rank, --dense, --overwrite" in err


def test_a_token_is_not_dropped_from_a_whole_model(
    tiny_base: str, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = Adapter("word", "textual-inversion", {}, tokens={"<yy>": {"text_encoder": torch.ones(1, 32)}})
    save_adapter(token, tmp_path / "word.safetensors", format="embedding", base=pipe)
    words = [str(tmp_path / "word.safetensors"), "--base", tiny_base, "--into-base", str(tmp_path / "model")]
    assert cli.main(["convert", *words]) == 1
    assert "holds the token '<yy>', which is no change of weights" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_file_of_another_base_is_made_one_of_this_on_request(
    convert: Run, tiny_sd: Callable[[], Any], style: Path, tmp_path: Path
) -> None:
    other = tiny_sd()
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    other.save_pretrained(tmp_path / "other")
    output = tmp_path / "moved.safetensors"
    words = ["--output", str(output), "--format", "sara"]
    code, _, err = convert(*words, base=str(tmp_path / "other"))
    assert code == 1 and "style.safetensors was trained on another base model" in err
    code, _, _ = convert(*words, "--any-base", base=str(tmp_path / "other"))
    assert code == 0 and load_adapter(output, base=other).kind == "sparse"
    code, _, err = convert("--into-base", str(tmp_path / "merged"), base=str(tmp_path / "other"))
    assert code == 1 and not (tmp_path / "merged").exists()


def test_inspect_counts_entries(
    style: Path, convert: Run, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load_adapter(style, base=pipe)
    sizes = [math.prod(change.shape) for change in adapter.changes.values()]
    entries = sum(max(1, size // 8) for size in sizes)
    assert cli.main(["inspect", str(style)]) == 0
    lines = capsys.readouterr().out.splitlines()
    share = f"{entries / sum(sizes):.2%}"
    assert f"sparse        {len(sizes)} parameters, {entries:,} entries of {sum(sizes):,} ({share})" in lines
    assert "format        sara" in lines and "threshold     0.002" in lines
    assert not any(line.startswith("quantile") for line in lines)
    convert("--output", str(tmp_path / "dense.safetensors"), "--format", "kohya")
    assert cli.main(["inspect", str(tmp_path / "dense.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"dense         {len(sizes)} parameters, {sum(sizes):,} entries" in lines


@pytest.mark.parametrize("rule", ["{", "[]", '{"threshold": "x"}', '{"quantile": {}}'])
def test_inspect_takes_a_strangers_file_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    name = "unet.conv_in.bias"
    tensors = {
        f"{name}.gaps": torch.ones(5, dtype=torch.int16),
        f"{name}.delta": torch.ones(5),
        f"{name}.shape": torch.tensor([-3, 7]),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"studio.sara": rule})
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "sparse        1 parameters, 5 entries\n" in out
    assert "threshold" not in out and "quantile" not in out


def test_checkpoint_of_the_reference_program_is_converted_only_on_request(
    convert: Run, pipe: Any, tmp_path: Path
) -> None:
    content: dict[Any, Any] = {"threshold": 0.01}
    for number, parameter in enumerate(pipe.unet.parameters()):
        content[number] = parameter[parameter.abs() < 0.01] + 0.5
    file, output = tmp_path / "unet.pt", tmp_path / "out.safetensors"
    torch.save(content, file)
    words = ["--output", str(output), "--format", "sara"]
    code, _, err = convert(*words, file=file)
    assert code == 1 and "is a pickle" in err
    code, _, _ = convert(*words, "--reference", file=file)
    assert code == 0
    values = [change.values for change in load_adapter(output, base=pipe).changes.values()]
    assert torch.allclose(torch.cat(values), torch.tensor(0.5))
