"""Several processes train to what one trains to with as large a step, and share the pictures of a batch."""

import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from studio.adapters.adapter import Adapter
from studio.adapters.parameters import components_of, find_parameter
from studio.batches.manifest import read_manifest
from studio.batches.run import draw_batch
from studio.errors import TrainingError, UsageError
from studio.models.base import load_base
from studio.registry import TRAINERS
from studio.specs import BatchSpec, Event, GenerateSpec, TrainSpec, parse_spec
from studio.trainers.loop import train
from studio.trainers.processes import Processes, join
from studio.trainers.run_folder import RunFolder

STEPS = 2
# What the methods cannot do without, or what makes them take turns in their course.
OWN: Mapping[str, Mapping[str, Any]] = {
    "sara": {"quantile": 0.2, "reselect_at": 1, "train_text_encoder": True, "learning_rate": 1e-3},
    "full": {"learning_rate": 1e-4, "train_text_encoder": True},
    "textual-inversion": {"token": "sks"},
    "b-lora": {"content_blocks": ("mid_block",), "style_blocks": ("up_blocks.1",)},
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "dropout": {"dropout": 0.5, "caption_dropout": 0.3, "token": "sks", "token_until": 0.5},
    "averaged": {"checkpoint_every": 1, "average_last": 2},
    "lora-ga": {"init": "lora-ga", "init_batches": 1},
    "eva": {"init": "eva", "init_batches": 1, "gradient_accumulation": 2},
    "everything": {
        "train_text_encoder": True,
        "class_prompts": ("a thing", "a place"),
        "class_pictures": 3,
        "prior_weight": 0.5,
        "validation_split": 0.2,
        "ema_decay": 0.5,
        "sample_every": 2,
        "save_every": 1,
        "cache": "disk",
    },
}


class Together:
    """What two processes found, and one process alone on the same data."""

    def __init__(self, folder: Path, base: Path) -> None:
        self._folder, self.base = folder, load_base(str(base), device="cpu")
        self._doubled: dict[str, tuple[Adapter, list[Event]]] = {}
        specs = {name: self.settings(name) for name in [*TRAINERS.names(), *VARIANTS]}
        plan = folder / "plan.json"
        plan.write_text(json.dumps({**specs, "batch": self.batch("pictures")}), encoding="utf-8")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
        command += ["--num_processes", "2", "--main_process_port", "0"]
        command += [str(Path(__file__).with_name("in_processes.py")), str(base), str(plan), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=folder)
        assert done.returncode == 0, done.stderr
        self.first, self.second = (pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1))

    def settings(self, name: str) -> dict[str, Any]:
        own = {"method": name, **OWN.get(name, {})} if name in TRAINERS else dict(VARIANTS[name])
        rank = {"rank": 2} if "rank" in TRAINERS[own.get("method", "lora")].Options.model_fields else {}
        places = {
            "data": str(self._folder / "data"),
            "output": str(self._folder / "two" / f"{name}.safetensors"),
            "cache_folder": str(self._folder / "cache"),
        }
        fixed = {"prompt": "sks dog", "device": "cpu", "warmup_steps": 0, "steps": STEPS, "batch_size": 1}
        return fixed | places | {"learning_rate": 1e-2} | rank | own

    def batch(self, output: str) -> dict[str, Any]:
        """Return the request for six pictures."""
        prompts = self._folder / "prompts.txt"
        prompts.write_text(f"a fox\na cat --s 2 --n fog\n{'sea ' * 30}\n", encoding="utf-8")
        return {
            "base": str(self._folder / "base"),
            "prompts": str(prompts),
            "seeds": "1-2",
            "steps": 1,
            "device": "cpu",
            "output": str(self._folder / output),
        }

    def alone(self, name: str, *, events: list[Event] | None = None, **values: Any) -> Adapter:
        """Train in this process."""
        changed = {"output": str(self._folder / "alone" / f"{name}.safetensors"), "overwrite": True}
        spec = TrainSpec.model_validate(self.settings(name) | changed | values)
        told: list[Event] = [] if events is None else events
        return train(self.base, spec, sample=draw, on_event=told.append)

    def doubled(self, name: str) -> tuple[Adapter, list[Event]]:
        """Train with twice the batch in this process, once for all who ask."""
        if name not in self._doubled:
            events: list[Event] = []
            self._doubled[name] = self.alone(name, batch_size=2, events=events), events
        return self._doubled[name]

    def weights(self, adapter: Adapter, *, weight: float = 1.0) -> Tensor:
        """Return all weights that an adapter changes, as they are with it, in fp64."""
        components = components_of(self.base)
        own = {name: find_parameter(components, name).detach() for name in adapter.changes}
        changed = [
            own[name].double() + weight * change.delta(own[name], weight=1.0).double()
            for name, change in adapter.changes.items()
        ]
        return torch.cat([part.flatten() for part in changed])


def draw(
    pipe: Any, adapter: Adapter | None, specs: Sequence[GenerateSpec], paths: Sequence[Path]
) -> list[Any]:
    return [Image.new("RGB", (64, 64), "green") for _ in specs]


@pytest.fixture(scope="module")
def together(tiny_sd: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Return what came of one launch: starting two Pythons is most of what these tests take."""
    folder = tmp_path_factory.mktemp("together")
    tiny_sd().save_pretrained(folder / "base")
    data = folder / "data"
    data.mkdir()
    for number in range(5):
        picture = Image.linear_gradient("L").resize((72, 64)).rotate(72 * number).convert("RGB")
        picture.save(data / f"{number}.png")
    # Masks of unlike areas, and pictures without.
    for number in (0, 2):
        mask = Image.new("L", (72, 64), 0)
        mask.paste(255, (0, 0, 20 + 10 * number, 30))
        mask.save(data / f"{number}.mask.png")
    (data / "1.txt").write_text("a blue sks wall")
    return Together(folder, folder / "base")


def bits(value: Any) -> list[Any]:
    """Return all tensors in changes and tokens, whatever the kind."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in bits(item)]
    if isinstance(value, Mapping):
        return [tensor for key in value for tensor in bits(value[key])]
    return bits(vars(value)) if hasattr(value, "__dict__") else []


def identical(one: Adapter, other: Adapter) -> bool:
    pairs = list(zip(bits([one.changes, one.tokens]), bits([other.changes, other.tokens]), strict=True))
    return (
        one.changes.keys() == other.changes.keys()
        and all(torch.equal(a, b) for a, b in pairs)
        and bool(pairs)
    )


@pytest.mark.parametrize("name", [*TRAINERS.names(), *(name for name in VARIANTS if name != "eva")])
def test_two_processes_give_the_bits_of_one_that_accumulates_twice_as_many(
    together: Together, name: str
) -> None:
    given = together.settings(name)
    changed = {"gradient_accumulation": 2 * given.get("gradient_accumulation", 1)}
    if "init_batches" in given:
        changed["init_batches"] = 2 * given["init_batches"]
    alone = together.alone(name, **changed)
    assert identical(together.first[name]["adapter"], alone)
    assert identical(together.second[name]["adapter"], alone)


@pytest.mark.parametrize("name", ["sara", "eva", "everything"])
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(together: Together, name: str) -> None:
    shared = together.first[name]["adapter"]
    doubled = together.weights(together.doubled(name)[0])
    size = doubled.norm()
    assert (together.weights(shared) - doubled).norm() < 1e-5 * size  # fp32 sums in another order
    assert (together.weights(shared, weight=0.0) - doubled).norm() > 1e-3 * size, "it has learned"


def test_the_first_process_alone_tells_draws_and_writes(together: Together) -> None:
    first, second = together.first["everything"], together.second["everything"]
    assert second["events"] == [] and second["drawn"] == []
    assert sorted(first["drawn"]) == ["a place", "a thing", "a thing", "sks dog", "sks dog"]
    progress = [event for event in first["events"] if event.kind == "progress" and "loss" in event.values]
    assert [event.step for event in progress] == [1, 2]
    log = RunFolder(Path(together.settings("everything")["output"])).log.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in log] == [event.kind for event in first["events"]]
    cached = sorted(
        path.suffix for path in Path(together.settings("everything")["cache_folder"]).rglob("*.*")
    )
    # Four pictures to train on and three of the class; text encoders that learn leave no captions to keep.
    assert cached == [".safetensors"] * len(cached) and 3 <= len(cached) <= 7


def test_the_report_says_what_a_step_is(together: Together) -> None:
    words = "2 steps of batch 1 x 2 accumulated x 2 processes = 8 samples, 1.6 epochs"
    assert words in together.first["eva"]["events"][0].message
    assert together.first["eva"]["adapter"].metadata["ss_epoch"] == "2"


def test_losses_are_those_of_all_samples(together: Together) -> None:
    _, alone = together.doubled("everything")
    for value in ("loss", "validation_loss"):
        shared, wanted = (
            [event.values[value] for event in events if value in event.values]
            for events in (together.first["everything"]["events"], alone)
        )
        assert len(shared) == 2 and shared == pytest.approx(wanted, rel=1e-5)  # fp32 sums


def test_a_stop_that_one_process_asks_for_stops_all_and_the_run_goes_on_bit_for_bit(
    together: Together,
) -> None:
    for found in (together.first, together.second):
        assert found["stopped"]["adapter"].metadata["ss_steps"] == "1"
        assert identical(found["resumed"]["adapter"], found["lora"]["adapter"])
    said = [event.message for event in together.first["resumed"]["events"]]
    assert "Goes on after step 1." in said


def test_another_number_of_processes_goes_on_if_steps_have_as_many_samples(together: Together) -> None:
    output = together.settings("lora")["output"]
    given = {"output": output, "resume": True, "overwrite": False}
    with pytest.raises(
        TrainingError, match=r"batch_size x gradient_accumulation x processes was 2, is 1.*Put it back"
    ):
        together.alone("lora", **given)
    events: list[Event] = []
    resumed = together.weights(together.alone("lora", batch_size=2, events=events, **given))
    through = together.weights(together.first["lora"]["adapter"])
    assert (resumed - through).norm() < 1e-5 * through.norm()  # fp32 sums in another order
    assert "batch_size was 1, is 2, processes was 2, is 1" in " ".join(event.message for event in events)


@pytest.mark.parametrize(
    ("run", "first", "second"),
    [
        ("second fails", "process 1 has failed: OSError: a picture is gone", "OSError: a picture is gone"),
        ("first fails", "OSError: the disk is full", "process 0 has failed."),
        ("diverges", "the loss is no longer finite at step 2", "process 1 ends, as process 0 has failed."),
        ("unlike", "process 1 has failed: process 1 was given another run", "seed was 0, is 1"),
    ],
)
def test_one_that_fails_ends_all_and_each_says_which(
    together: Together, run: str, first: str, second: str
) -> None:
    assert first in together.first[run]["error"]
    assert second in together.second[run]["error"]


def test_what_is_done_is_kept_when_another_process_fails(together: Together) -> None:
    said = [event.message for event in together.first["second fails"]["events"]]
    assert any(text.startswith("Checkpoint after step 1") for text in said)


def test_each_picture_of_a_batch_is_drawn_by_one_process_also_after_a_failure(together: Together) -> None:
    first, second = together.first, together.second
    assert "process 1 has failed" in first["batch fails"]["error"]
    assert "OSError: the disk is full" in second["batch fails"]["error"]
    runs = [found[run]["pictures"] for run in ("batch fails", "batch") for found in (first, second)]
    assert [len(names) for names in runs] == [3, 1, 1, 1]
    names = [f"{line:04d}-{seed}.png" for line in (1, 2, 3) for seed in (1, 2)]
    assert sorted(itertools.chain(*runs)) == names

    shared, alone = Path(together.batch("pictures")["output"]), Path(together.batch("alone")["output"])
    draw_batch(parse_spec(BatchSpec, together.batch("alone")))
    for name in names:
        with Image.open(shared / name) as picture, Image.open(alone / name) as wanted:
            assert picture.tobytes() == wanted.tobytes(), name
    one, other = read_manifest(shared), read_manifest(alone)
    assert one == other and len((shared / "manifest.jsonl").read_text().splitlines()) == 6
    for found, main in ((first, True), (second, False)):
        result, again = found["batch"]["result"], found["batch again"]["result"]
        assert (result.wanted, result.drawn, result.kept, result.main) == (6, 2, 4, main)
        assert (again.drawn, again.kept) == (0, 6)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP.*plain data parallelism"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*plain data parallelism"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "started one.*--multi_gpu"),
    ],
    ids=["fsdp", "deepspeed", "cpu-without-mpi"],
)
def test_launches_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=words):
        join(torch.device("cpu"))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert Processes(3, 4, local=1).own(cuda) == torch.device("cuda:1")
    assert Processes(1, 2, local=1).own(cpu) == cpu and Processes().own(cuda) == cuda
    with pytest.raises(UsageError, match="'cuda:1' is one GPU, and there are 2 processes"):
        Processes(0, 2).own(torch.device("cuda:1"), asked="cuda:1")
    with pytest.raises(TrainingError, match="this machine has 2 GPUs for more processes"):
        Processes(2, 3, local=2).own(cuda)
