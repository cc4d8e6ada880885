"""A run that was interrupted, however, ends as if it had not been: bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from studio.adapters.adapter import Adapter
from studio.errors import OutputError, TrainingError
from studio.models.base import load_base
from studio.registry import TRAINERS
from studio.specs import Event, TrainSpec
from studio.trainers.loop import train
from studio.trainers.run_folder import RunFolder

Spec = Callable[..., TrainSpec]
# Each has state of its own beside parameters and moments, or another way to start.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sara": {"method": "sara", "quantile": 0.2, "reselect_at": 2, "learning_rate": 5e-3},
    "sara-every-part": {"method": "sara", "reselect_at": 1, "train_text_encoder": True, "rank_every": 2},
    "sara-adafactor": {"method": "sara", "reselect_at": 2, "learning_rate": 0.5, "optimizer": "adafactor"},
    "sara-prodigy": {"method": "sara", "reselect_at": 2, "learning_rate": 1.0, "optimizer": "prodigy"},
    "pissa": {"init": "pissa"},
    "lora-ga": {"init": "lora-ga", "init_batches": 1},
    "eva-fa": {"init": "eva", "init_batches": 1, "freeze_down": True},
    "moslora": {"moslora": True},
    "dropout": {"dropout": 0.5, "train_text_encoder": True, "caption_dropout": 0.3},
    "accumulation": {"gradient_accumulation": 2, "batch_size": 1},
    "ema": {"ema_decay": 0.9},
    "sara-ema": {
        "method": "sara",
        "quantile": 0.2,
        "reselect_at": 2,
        "learning_rate": 5e-3,
        "ema_decay": 0.9,
    },
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 1e-3},
    "lion": {"optimizer": "lion", "learning_rate": 1e-4},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "linear": {"schedule": "linear", "warmup_steps": 3},
    "token": {"token": "sks", "vectors": 2, "token_until": 0.5},
}
OWN: Mapping[str, Mapping[str, Any]] = {
    "b-lora": {"content_blocks": ("mid_block",), "style_blocks": ("up_blocks.1",)},
    "full": {"learning_rate": 1e-4},
    "textual-inversion": {"token": "sks"},
}
STEPS = 6


def settings(name: str) -> dict[str, Any]:
    given: dict[str, Any] = (
        {"method": name, **OWN.get(name, {})} if name in TRAINERS else dict(VARIANTS[name])
    )
    own = TRAINERS[given.get("method", "lora")].Options.model_fields
    rank = {} if "rank" not in own else {"rank": 2}
    return {"steps": STEPS, "learning_rate": 1e-2, **rank, **given}


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Spec:
    """Return a function from a name and changed settings to a run on the folder."""

    def build(name: str, **values: Any) -> TrainSpec:
        fixed = {"data": folder, "prompt": "sks dog", "device": "cpu", "warmup_steps": 0, "batch_size": 2}
        output = {"output": tmp_path / "out" / "dog.safetensors"}
        return TrainSpec.model_validate(fixed | output | settings(name) | values)

    return build


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[[], Any]) -> Iterator[Any]:
    """Return one base for all runs: each gives it back as it was."""
    yield tiny_sd()


def after(steps: int) -> Callable[[], bool]:
    """Return what asks a run to stop after so many steps."""
    asked = iter([False] * steps)
    return lambda: next(asked, True)


def contents(change: Any) -> dict[str, Any]:
    """Return all that a change holds by name; DoRA's holds another one."""
    found = {}
    for name, value in vars(change).items():
        # LoKr's factors are one matrix or two.
        listed = {str(place): part for place, part in enumerate(value)} if isinstance(value, tuple) else None
        nested = contents(value) if hasattr(value, "delta") else listed or {"": value}
        found |= {f"{name}.{key}": item for key, item in nested.items()}
    return found


def identical(one: Adapter, other: Adapter) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    if one.changes.keys() != other.changes.keys() or one.tokens.keys() != other.tokens.keys():
        return False
    if not all(
        torch.equal(rows, other.tokens[token][component])
        for token, embeddings in one.tokens.items()
        for component, rows in embeddings.items()
    ):
        return False
    pairs = [(contents(one.changes[name]), contents(other.changes[name])) for name in one.changes]
    return all(a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in pairs)


def losses(events: list[Event]) -> list[float]:
    return [event.values["loss_smoothed"] for event in events if event.kind == "progress"]


@pytest.mark.parametrize("name", [*TRAINERS, *VARIANTS])
def test_a_run_stopped_twice_and_resumed_ends_like_one_in_one_go(base: Any, run: Spec, name: str) -> None:
    whole: list[Event] = []
    in_one_go = train(base, run(name, steps=4), on_event=whole.append)
    parts: list[Event] = []
    first = train(base, run(name, steps=4, overwrite=True), on_event=parts.append, stop=after(1))
    train(base, run(name, steps=4, resume=True), on_event=parts.append, stop=after(2))
    resumed = train(base, run(name, steps=4, resume=True), on_event=parts.append)
    assert identical(in_one_go, resumed) and in_one_go.metadata == resumed.metadata
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4
    assert not identical(in_one_go, first), "the steps after the first stop must count"


def test_a_longer_run_goes_on_from_one_that_is_done(base: Any, run: Spec) -> None:
    values = {"schedule": "constant", "checkpoint_every": 3}
    in_one_go = train(base, run("lora", **values))
    train(base, run("lora", **values, overwrite=True, steps=3))
    resumed = train(base, run("lora", **values, resume=True))
    assert identical(in_one_go, resumed)
    with pytest.raises(TrainingError, match="steps is 4, fewer than the 6 that are done"):
        train(base, run("lora", **values, resume=True, steps=4))


def test_a_stop_between_checkpoints_does_not_change_their_mean(base: Any, run: Spec) -> None:
    values = {"checkpoint_every": 2, "keep_checkpoints": 2, "average_last": 2}
    in_one_go = train(base, run("lora", **values))
    train(base, run("lora", **values, overwrite=True), stop=after(5))
    resumed = train(base, run("lora", **values, resume=True))
    assert identical(in_one_go, resumed)
    with pytest.raises(TrainingError, match="checkpoint_every was 2, is 3"):
        train(base, run("lora", **{**values, "checkpoint_every": 3}, resume=True))


def test_another_course_of_the_learning_rate_is_said(base: Any, run: Spec) -> None:
    said: list[str] = []
    train(base, run("lora", steps=3, checkpoint_every=3))
    train(base, run("lora", resume=True), on_event=lambda event: said.append(event.message))
    assert any("was to have 3 steps, now 6" in text for text in said)


def test_samples_do_not_change_a_resumed_run(base: Any, run: Spec) -> None:
    drawn: list[str | None] = []

    def draw(pipe: Any, adapter: Adapter | None, specs: Any, paths: Any) -> list[Image.Image]:
        drawn.append(adapter and adapter.metadata["ss_steps"])
        return [Image.new("RGB", (8, 8)) for _ in specs]

    in_one_go = train(base, run("sara", ema_decay=0.5))
    values = {"ema_decay": 0.5, "sample_every": 2}
    train(base, run("sara", **values, overwrite=True), stop=after(4), sample=draw)
    resumed = train(base, run("sara", **values, resume=True), sample=draw)
    assert identical(in_one_go, resumed)
    assert drawn == [None, "2", "4", "6"], "the start is not drawn again"


def test_an_error_from_outside_keeps_the_steps_that_are_done(base: Any, run: Spec) -> None:
    def fail(event: Event) -> None:
        if event.kind == "progress" and event.step == 4:
            raise KeyboardInterrupt

    in_one_go = train(base, run("sara"))
    with pytest.raises(KeyboardInterrupt):
        train(base, run("sara", overwrite=True), on_event=fail)
    events: list[Event] = []
    assert identical(in_one_go, train(base, run("sara", resume=True), on_event=events.append))
    assert [event.step for event in events if event.kind == "progress"] == [5, 6]


def test_an_error_within_a_step_keeps_the_checkpoint_before(
    base: Any, run: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.trainers.methods.lora import Lora

    in_one_go = train(base, run("lora"))

    def fail(self: Lora, step: int) -> None:
        if step == 4:
            raise RuntimeError("in the middle of a step")

    with monkeypatch.context() as patched:
        patched.setattr(Lora, "after_step", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            train(base, run("lora", overwrite=True, checkpoint_every=2))
    assert [path.stem for path in checkpoints(run("lora"))] == ["000002"]
    assert identical(in_one_go, train(base, run("lora", resume=True)))


def checkpoints(spec: TrainSpec) -> list[Path]:
    return sorted(RunFolder(spec.output).checkpoints.iterdir())


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(base: Any, run: Spec) -> None:
    in_one_go = train(base, run("lora"))
    for damage in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4] + b"\1\2\3\4",
        lambda data: b"",
    ):
        train(base, run("lora", checkpoint_every=2, overwrite=True), stop=after(4))
        newest = checkpoints(run("lora"))[-1]
        newest.write_bytes(damage(newest.read_bytes()))
        events: list[Event] = []
        resumed = train(base, run("lora", resume=True), on_event=events.append)
        assert identical(in_one_go, resumed)
        said = "\n".join(event.message for event in events)
        assert "000004.safetensors is damaged" in said and "going back to the one of step 2" in said
        assert [event.step for event in events if event.kind == "progress"] == [3, 4, 5, 6]


def test_without_a_whole_checkpoint_resuming_is_refused(base: Any, run: Spec) -> None:
    with pytest.raises(TrainingError, match=r"there is no checkpoint in .*dog-run.*without resume"):
        train(base, run("lora", resume=True))
    train(base, run("lora"), stop=after(2))
    (only,) = checkpoints(run("lora"))
    only.write_bytes(only.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"000002\.safetensors is damaged .*cannot go on"):
        train(base, run("lora", resume=True))


def test_changed_settings_are_refused_by_name_all_at_once(base: Any, run: Spec, folder: Path) -> None:
    train(base, run("lora"), stop=after(2))
    with pytest.raises(TrainingError) as caught:
        train(base, run("lora", resume=True, rank=3, seed=1, schedule="linear", precision="bf16"))
    text = str(caught.value)
    for words in (
        "rank was 2, is 3",
        "seed was 0, is 1",
        "schedule was 'cosine', is 'linear'",
        "precision was",
    ):
        assert words in text
    assert "batch_size" not in text and "save_every" in text, "what may change is listed"
    harmless = {"save_every": 2, "sample_steps": 3, "author": "me", "keep_checkpoints": 3, "cache": "off"}
    train(base, run("lora", resume=True, **harmless))


def test_a_changed_data_set_is_refused_by_file(base: Any, run: Spec, folder: Path) -> None:
    train(base, run("lora"), stop=after(2))
    (folder / "1.txt").write_text("a green wall")
    Image.new("RGB", (72, 64), "green").save(folder / "2.png")
    (folder / "3.png").rename(folder / "4.png")
    with pytest.raises(TrainingError) as caught:
        train(base, run("lora", resume=True))
    text = str(caught.value)
    assert "changed pictures or captions: data/1.png, data/2.png" in text
    assert "missing pictures: data/3.png" in text and "new pictures: data/4.png" in text


def test_the_data_may_move_but_the_base_may_not_change(base: Any, run: Spec, folder: Path) -> None:
    in_one_go = train(base, run("lora"))
    train(base, run("lora", overwrite=True), stop=after(2))
    moved = folder.rename(folder.with_name("elsewhere"))
    weight = base.unet.conv_in.weight.data
    try:
        base.unet.conv_in.weight.data = weight + 1
        with pytest.raises(TrainingError, match="the base model has other weights"):
            train(base, run("lora", resume=True, data=moved))
    finally:
        base.unet.conv_in.weight.data = weight
    assert identical(in_one_go, train(base, run("lora", resume=True, data=moved)))


def test_an_earlier_run_is_not_mixed_with_a_new_one(base: Any, run: Spec) -> None:
    train(base, run("lora", save_every=2, checkpoint_every=2))
    with pytest.raises(OutputError, match=r"checkpoints exists.*--resume.*--overwrite"):
        train(base, run("lora"))
    train(base, run("lora", overwrite=True))
    assert not (RunFolder(run("lora").output).checkpoints).exists()


# Trains as the tests above do, in processes of their own that stall where they are told to.
SCRIPT = """
import json, os, sys, time
sys.path[:] = [entry for entry in sys.path if entry]
import torch
from pathlib import Path
from studio.models.base import load_base
from studio.specs import TrainSpec
from studio.trainers import checkpoint
from studio.trainers.loop import train

torch.set_num_threads(1)
write, saves = checkpoint.save_file, []

def stall(what):
    if where == what:
        print(os.getpid(), flush=True)
        time.sleep(600)

def save(tensors, path, metadata):
    saves.append(path)
    write(tensors, path, metadata=metadata)
    if len(saves) == 2:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        stall("during")
        Path(path).write_bytes(content)

checkpoint.save_file = save
for line in sys.stdin:
    base, spec, where = json.loads(line)
    if os.fork() == 0:
        run = TrainSpec.model_validate(spec)
        train(load_base(base, device="cpu"), run, on_event=lambda event: event.step == 5 and stall("between"))
    os.wait()
"""


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[..., None]]:
    """Return a function that starts a run of a base and kills it in the midst of a place."""
    words = [sys.executable, "-P", "-c", SCRIPT]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        given, said = process.stdin, process.stdout

        def kill(base: Path, spec: TrainSpec, where: str) -> None:
            print(json.dumps([str(base), spec.model_dump(mode="json"), where]), file=given, flush=True)
            os.kill(int(said.readline()), signal.SIGKILL)

        yield kill
        process.kill()


@pytest.mark.parametrize(("where", "goes_on_at"), [("during", 3), ("between", 5)])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    base: Any, run: Spec, tmp_path: Path, killed: Callable[..., None], where: str, goes_on_at: int
) -> None:
    base.save_pretrained(tmp_path / "base")
    pipe = load_base(str(tmp_path / "base"), device="cpu")
    in_one_go = train(pipe, run("lora"))
    spec = run("lora", checkpoint_every=2, overwrite=True)
    killed(tmp_path / "base", spec, where)
    assert (RunFolder(spec.output).checkpoints / "000004.part").exists() == (where == "during")
    events: list[Event] = []
    resumed = train(pipe, run("lora", resume=True, checkpoint_every=2), on_event=events.append)
    assert next(event.step for event in events if event.kind == "progress") == goes_on_at
    assert identical(in_one_go, resumed)
    assert [path.name for path in checkpoints(spec)] == ["000004.safetensors", "000006.safetensors"]
    lines = [json.loads(line) for line in RunFolder(spec.output).log.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "progress"][-1] == STEPS


def test_a_checkpoint_holds_tensors_and_text_only(base: Any, run: Spec) -> None:
    train(base, run("lora"), stop=after(2))
    (path,) = checkpoints(run("lora"))
    assert all(isinstance(value, torch.Tensor) for value in load_file(path).values())
