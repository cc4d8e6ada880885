"""`studio merge`: files in, one ordinary file out, and what is said before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import studio
from studio import cli
from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, read_header, save_adapter
from studio.adapters.header import tensor_hash
from studio.adapters.origin import origin_facts
from studio.errors import AdapterError, CompositionError, OutputError
from studio.merging.report import block_of
from studio.registry import KINDS
from studio.specs import Event, MergeSpec

Make = Callable[..., Adapter]
PART = (
    "unet.mid_block.resnets.0",
    "unet.mid_block.attentions.0.proj",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "text_encoder.text_model.encoder.layers.0.self_attn",
)


@pytest.fixture(scope="module")
def pipe(tiny_sd: Callable[[], Any]) -> Any:
    return tiny_sd()


@pytest.fixture(scope="module")
def tiny_base(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(pipe: Any, everywhere: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return files of two LoRAs, one in kohya's names and one in diffusers', and of a DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    facts = {"ss_base_model_version": "sd_v1", **origin_facts(pipe)}
    found = {}
    for seed, (name, kind, form) in enumerate(
        (("dog", "lora", "kohya"), ("style", "lora", "diffusers"), ("dora", "dora", "kohya"))
    ):
        adapter = everywhere(pipe, kind=kind, seed=seed, components=PART)
        words = {"modelspec.trigger_phrase": f"sks {name}"}
        found[name] = save_adapter(
            adapter,
            folder / f"{name}.safetensors",
            format=form,
            dtype=torch.float32,
            metadata=facts | words,
            base=pipe,
        )
    return found


@pytest.fixture(scope="module")
def total(files: dict[str, Path], pipe: Any) -> Callable[..., torch.Tensor]:
    """Return a function: a parameter's name and shape, weights of dog and style -> their sum."""
    adapters = [load_adapter(files[name], base=pipe) for name in ("dog", "style")]

    def add(name: str, shape: tuple[int, ...], *weights: float) -> torch.Tensor:
        pairs = zip(adapters, weights, strict=True)
        return sum(adapter.changes[name].delta(torch.empty(shape), weight=share) for adapter, share in pairs)

    return add


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_the_written_file_is_read_again_as_the_sum(
    files: dict[str, Path], pipe: Any, total: Any, tmp_path: Path, form: str
) -> None:
    output = tmp_path / "both.safetensors"
    spec = MergeSpec(
        adapters=(f"{files['dog']}:0.8", f"{files['style']}:-0.5"),
        output=output,
        base=None,
        format=form,
        precision="fp32",
    )
    result = studio.merge(spec)
    assert result.paths == (output,)
    got = load_adapter(output, base=pipe)
    assert any(name.startswith("text_encoder.") for name in got.changes)
    for name, change in got.changes.items():
        delta = change.delta(torch.empty(change.shape), weight=1.0)
        wanted = total(name, change.shape, 0.8, -0.5)
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-5)  # fp32 in another order.
    metadata = read_header(output).metadata
    recipe = json.loads(metadata["studio.merge"])
    assert recipe["how"] == "linear" and recipe["options"] == {}
    assert recipe["adapters"][1] == {
        "name": "style",
        "file": "style.safetensors",
        "sha256": tensor_hash(files["style"]),
        "weight": -0.5,
    }
    assert metadata["modelspec.trigger_phrase"] == "sks dog, sks style"
    assert metadata["ss_network_dim"] == "6" and metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["studio.base"] == origin_facts(pipe)["studio.base"]


def test_the_report_tells_error_energy_size_and_the_rank_to_take(
    files: dict[str, Path], total: Any, tmp_path: Path
) -> None:
    adapters = (str(files["dog"]), str(files["style"]))
    preview = tmp_path / "curves.png"
    thin = studio.merge(MergeSpec(adapters=adapters, how="svd", rank=2, preview=preview))
    assert thin.paths == () and Image.open(preview).size[0] > 560
    report = thin.report
    assert {row.name for row in report.rows} == {"unet.mid_block", "unet.up_blocks.1", "text_encoder", "all"}
    assert report.rows[-1] is report.whole and report.whole.layers == len(thin.adapter.changes)
    missed = kept = 0.0
    for name, change in thin.adapter.changes.items():
        wanted = total(name, change.shape, 1.0, 1.0).double()
        apart = float((change.delta(torch.empty(change.shape), weight=1.0).double() - wanted).norm())
        assert report.errors[name] == pytest.approx(apart / float(wanted.norm()), rel=1e-4)
        missed, kept = missed + apart**2, kept + float(wanted.norm()) ** 2
    whole = report.whole
    assert whole.error == pytest.approx((missed / kept) ** 0.5, rel=1e-4)
    assert whole.curve[0] == 1 and whole.curve[2] == pytest.approx(whole.error) and whole.curve[6] < 1e-6
    suggested = whole.rank_for(0.95)
    assert suggested is not None and 2 < suggested <= 6
    for rank, enough in ((suggested, True), (suggested - 1, False)):
        error = studio.merge(MergeSpec(adapters=adapters, how="svd", rank=rank)).report.whole.error
        assert (1 - error**2 >= 0.95) is enough
    assert report.lines()[-1].startswith(f"rank in all layers: {suggested} keeps 95%, ")


@pytest.mark.parametrize(
    ("how", "options", "form", "precision"),
    [
        ("svd", {"rank": 4}, "kohya", "auto"),
        ("svd", {"rank": 4}, "diffusers", "fp32"),
        ("ties", {"dense": True}, "kohya", "auto"),
    ],
    ids=["kohya", "diffusers", "dense"],
)
def test_the_predicted_size_is_that_of_the_files_tensors(
    files: dict[str, Path], tmp_path: Path, how: str, options: dict[str, Any], form: str, precision: str
) -> None:
    output = tmp_path / "both.safetensors"
    adapters = (str(files["dog"]), str(files["style"]))
    spec = MergeSpec(adapters=adapters, how=how, output=output, format=form, precision=precision, **options)
    predicted = studio.merge(spec).report.whole.bytes
    assert output.stat().st_size - read_header(output).data_start == predicted


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_loads_the_file_as_it_is_meant(
    files: dict[str, Path], total: Any, tiny_sd: Callable[[], Any], tmp_path: Path, form: str
) -> None:
    output = tmp_path / "both.safetensors"
    adapters = (f"{files['dog']}:0.8", str(files["style"]))
    studio.merge(MergeSpec(adapters=adapters, output=output, format=form, precision="fp32"))
    pipe = tiny_sd()
    name = "mid_block.attentions.0.proj_in.weight"
    before = pipe.unet.get_parameter(name).detach().clone()
    pipe.load_lora_weights(str(output))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted = before + total(f"unet.{name}", tuple(before.shape), 0.8, 1.0)
    torch.testing.assert_close(pipe.unet.get_parameter(name).detach(), wanted, rtol=1e-5, atol=1e-5)  # fp32.


def test_dora_needs_the_base_and_is_merged_with_it(
    files: dict[str, Path], pipe: Any, tiny_base: str, tmp_path: Path
) -> None:
    adapters = (f"{files['dora']}:0.7", str(files["dog"]))
    with pytest.raises(
        AdapterError, match=r"'dora' is of the kind dora, .* without the base model\. Give --base"
    ):
        studio.merge(MergeSpec(adapters=adapters))
    output = tmp_path / "both.safetensors"
    studio.merge(MergeSpec(adapters=adapters, how="ties", rank=3, base=tiny_base, output=output))
    assert load_adapter(output, base=pipe).kind == "lora"


def test_tokens_go_into_files_of_their_own(files: dict[str, Path], pipe: Any, tmp_path: Path) -> None:
    token = Adapter("fox", "textual-inversion", {}, {"<fox>": {"text_encoder": torch.ones(2, 32)}})
    one = save_adapter(token, tmp_path / "fox.safetensors", format="embedding")
    output = tmp_path / "out" / "both.safetensors"
    spec = MergeSpec(adapters=(str(files["dog"]), str(one)), output=output)
    result = studio.merge(spec)
    assert [path.name for path in result.paths] == ["both.safetensors", "both-fox.safetensors"]
    read = load_adapter(result.paths[1], base=pipe)
    assert torch.equal(read.tokens["<fox>"]["text_encoder"], torch.ones(2, 32))
    other = save_adapter(token, tmp_path / "again.safetensors", format="embedding")
    with pytest.raises(CompositionError, match="'again' brings the token <fox>, as another adapter does"):
        studio.merge(MergeSpec(adapters=(str(files["dog"]), str(one), str(other))))


def test_what_is_for_other_bases_or_in_the_way_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    one, two = (save_adapter(_wide(width), tmp_path / f"w{width}.safetensors") for width in (768, 1024))
    with pytest.raises(AdapterError, match=r"different base models: 'w768' for SD 1\.5, 'w1024' for SD 2\.x"):
        studio.merge(MergeSpec(adapters=(str(one), str(two))))
    with pytest.raises(OutputError, match="exists"):
        studio.merge(MergeSpec(adapters=(str(files["dog"]),), output=one))
    picture = tmp_path / "x.png"
    picture.write_bytes(b"")
    with pytest.raises(OutputError, match="exists"):
        studio.merge(MergeSpec(adapters=(str(files["dog"]),), preview=picture))


def _wide(width: int) -> Adapter:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    generator = torch.Generator().manual_seed(0)
    return Adapter("wide", "lora", {name: KINDS["lora"].sample((1280, width), generator=generator)})


def test_the_command_shows_the_table_and_writes_the_file(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, recipe = tmp_path / "both.safetensors", tmp_path / "merge.toml"
    recipe.write_text('how = "ties"\nrank = 2\n')
    words = [f"{files['dog']}:0.8", str(files["style"]), "--config", str(recipe), "--density", "0.4"]
    assert cli.main(["merge", *words]) == 0
    shown = capsys.readouterr().out
    assert not output.exists() and shown.splitlines()[0].split()[:2] == ["block", "layers"]
    assert "rank in all layers: " in shown and "3+3" in shown
    assert cli.main(["merge", *words, "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    recipe = json.loads(read_header(output).metadata["studio.merge"])
    assert recipe["how"] == "ties" and recipe["options"] == {"dense": False, "density": 0.4, "rank": 2}
    assert cli.main(["merge", *words, "--output", str(output)]) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["merge", "--how", "svd"]) == 2
    assert "adapters: is required" in capsys.readouterr().err


def test_progress_is_told_layer_by_layer(files: dict[str, Path]) -> None:
    events: list[Event] = []
    result = studio.merge(MergeSpec(adapters=(str(files["dog"]),)), on_event=events.append)
    steps = [event.step for event in events if event.kind == "progress"]
    assert steps == [*range(1, len(result.adapter.changes) + 1)] and events[-1].kind == "finished"


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in.weight", "unet.down_blocks.1"),
        ("unet.mid_block.resnets.0.conv1.weight", "unet.mid_block"),
        ("unet.conv_in.weight", "unet"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1.weight", "text_encoder_2"),
    ],
)
def test_a_parameter_lies_in_its_block(name: str, block: str) -> None:
    assert block_of(name) == block
