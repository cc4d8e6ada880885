"""Runs that start from an adapter's file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.adapters.adapter import Adapter
from studio.adapters.files import load_adapter, save_adapter
from studio.adapters.header import tensor_hash
from studio.adapters.kinds.lora import LoraChange
from studio.adapters.parameters import components_of, find_parameter
from studio.errors import SpecError, TrainingError
from studio.registry import KINDS, TRAINERS
from studio.specs import Event, TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.start_file import check_layers
from studio.trainers.targets import by_name

Spec = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[[], Any]) -> Any:
    """Return one base for many runs: each gives it back as it was."""
    return tiny_sd()


def written(base: Any, folder: Path, method: str = "lora", **options: Any) -> Path:
    """Return a file of the layers that a method trains, with random changes of rank 3 and alpha 2."""
    trainer = TRAINERS[method]()
    given = {"data": "d", "output": "o.safetensors", "method": method, **options}
    trainer.prepare(base, parse_spec(TrainSpec, given))
    adapter: Adapter = trainer.export()
    trainer.release()
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: KINDS[adapter.kind].sample(change.shape, generator=generator)
        for name, change in adapter.changes.items()
    }
    form = TRAINERS[method].format
    return save_adapter(
        replace(adapter, changes=changes), folder / "old.safetensors", format=form, dtype=torch.float32
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_starts_with_the_files_change_whatever_its_alpha(
    base: Any, spec: Spec, tmp_path: Path, method: str
) -> None:
    file = written(base, tmp_path, method)
    events: list[Event] = []
    run = spec(method=method, rank=3, alpha=6, steps=1, learning_rate=1e-9, start_from=file)
    adapter = train(base, run, on_event=events.append)
    for name, change in load_adapter(file, base=base).changes.items():
        weight = find_parameter(components_of(base), name)
        before, after = (each.delta(weight, weight=1.0) for each in (change, adapter.changes[name]))
        assert torch.allclose(before, after, atol=1e-4)  # fp32, and one step of next to no size
    assert adapter.metadata["studio.start_from"] == tensor_hash(file)
    assert str(tmp_path) not in " ".join(adapter.metadata.values())
    assert f"Start: {file}" in events[0].message


@pytest.mark.parametrize(
    ("own", "values", "words"),
    [
        ({"method": "dora"}, {}, "is of the kind 'dora', this run's method makes 'lora'. Set method to dora"),
        ({}, {"rank": 2}, r"has rank 3 at 32 layers \(unet.*, \.\.\.\), the run has rank 2. Set rank to 3"),
        ({}, {"targets": "attention+ff"}, r"lacks \d+ layers \(.*\) of the \d+ that are trained. Choose tar"),
        ({}, {"block_ranks": {"attn1": 2}}, "has rank 3 at 1.*Set rank to 3 and leave block_ranks out"),
        ({"train_text_encoder": True}, {}, "changes 8 layers .* that the run does not train. Choose targets"),
    ],
    ids=["kind", "rank", "lacks", "blocks", "strays"],
)
def test_a_file_that_does_not_fit_is_refused_with_what_to_set(
    base: Any, spec: Spec, tmp_path: Path, own: dict[str, Any], values: dict[str, Any], words: str
) -> None:
    file = written(base, tmp_path, **own)
    with pytest.raises(TrainingError, match=f"old.safetensors {words}"):
        train(base, spec(**{"rank": 3, "start_from": file} | values))


def test_the_ranks_of_a_files_blocks_are_said_as_a_run_takes_them() -> None:
    layer = "unet.{}.attentions.0.transformer_blocks.0.attn{}.to_q.weight"
    places = [(block, number) for block in ("down_blocks.0", "mid_block", "up_blocks.1") for number in (1, 2)]
    ranks = dict(zip((layer.format(*place) for place in places), (3, 3, 5, 5, 3, 7), strict=True))
    changes = {
        name: LoraChange(torch.ones(rank, 9), torch.ones(9, rank), 1.0) for name, rank in ranks.items()
    }
    file = Adapter("old", "lora", changes)
    match = r"Set rank to 3 and block_ranks to mid_block = 5, up_.* = 7\."
    with pytest.raises(TrainingError, match=match) as said:
        check_layers(file, dict.fromkeys(ranks, 3))
    listed = str(said.value).split("block_ranks to ")[1].removesuffix(".").split(", ")
    own = {part: int(rank) for part, rank in (each.split(" = ") for each in listed)}
    names = [name.removesuffix(".weight").removeprefix("unet.") for name in ranks]
    found = by_name({"unet": names}, own, option="block_ranks")
    assert [found.get(f"unet.{name}", 3) for name in names] == list(ranks.values())


def test_another_start_or_another_method_is_refused(spec: Spec) -> None:
    given = {"data": "d", "output": "o.safetensors", "start_from": "old.safetensors"}
    for more, words in (
        ({"method": "loha"}, "only lora, dora and b-lora start from a file"),
        ({"init": "pissa"}, "the start 'pissa' sets the matrices, too"),
        ({"moslora": True}, "Leave moslora out"),
    ):
        with pytest.raises(SpecError, match=f"start_from: .*{words}"):
            parse_spec(TrainSpec, given | more)


def test_a_run_goes_on_only_with_the_file_that_it_started_from(base: Any, spec: Spec, tmp_path: Path) -> None:
    file = written(base, tmp_path)
    run = {"rank": 3, "steps": 1, "schedule": "constant", "checkpoint_every": 1}
    train(base, spec(**run, start_from=file))
    with pytest.raises(TrainingError, match=rf"start_from was '{tensor_hash(file)}', is None"):
        train(base, spec(**run, resume=True))
    moved = file.rename(tmp_path / "moved.safetensors")
    on = train(base, spec(**run | {"steps": 2}, start_from=moved, resume=True))
    assert on.metadata["ss_steps"] == "2"
