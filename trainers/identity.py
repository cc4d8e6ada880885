"""What a run and the one that it goes on from must have in common: settings, base and pictures."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.adapters.header import tensor_hash
from studio.data.cache import file_fingerprint
from studio.data.picture import Picture, PictureSet
from studio.errors import TrainingError
from studio.specs.train import TrainSpec

Identity = Mapping[str, Any]

MAY_CHANGE = frozenset(
    {
        "steps",
        # Where things lie; what lies there is compared itself.
        "base",
        "data",
        "class_data",
        "validation_data",
        "output",
        "cache_folder",
        # What no parameter depends on, but for the order that sums are rounded in.
        "attention",
        "author",
        "cache",
        "checkpoint_every",
        "compile",
        "device",
        "format",
        "gradient_checkpointing",
        "keep_adapters",
        "keep_checkpoints",
        "metadata",
        "offload_encoders",
        "overwrite",
        "resume",
        "sample_every",
        "sample_prompts",
        "sample_steps",
        "save_every",
        "skip_bad",
        "tracker",
        "validate_every",
    }
)
"""Settings that may differ from those that a run was started with."""
PER_STEP = "batch_size x gradient_accumulation x processes"
"""The samples of a step: that they stay as many is all that matters of the three."""


def identity(
    spec: TrainSpec,
    *,
    base: str,
    precision: str,
    data: Mapping[str, PictureSet | None],
    processes: int = 1,
) -> dict[str, Any]:
    """Return what a later run is compared with.

    Args:
        spec: The run.
        base: The base's fingerprint.
        precision: Number type of the forward pass.
        data: Its pictures by what they are for.
        processes: How many there are.
    """
    division = {
        "batch_size": spec.batch_size,
        "gradient_accumulation": spec.gradient_accumulation,
        "processes": processes,
    }
    settings = spec.model_dump(mode="json", exclude={"options", *MAY_CHANGE, *division})
    settings[PER_STEP] = math.prod(division.values())
    # As they act, whether they are given or the method's own.
    settings["learning_rate"] = spec.unet_learning_rate
    settings["text_encoder_learning_rate"] = spec.encoder_learning_rate
    if spec.start_from is not None:
        # What it holds, wherever it lies.
        settings["start_from"] = tensor_hash(spec.start_from)
    if spec.average_last:
        # The checkpoints are what is averaged.
        settings["checkpoint_every"] = spec.checkpoint_every
    if spec.class_prompts and spec.class_data is None:
        # Class pictures are drawn with as many steps as samples.
        settings["sample_steps"] = spec.sample_steps
    return {
        "settings": settings | spec.options.model_dump(mode="json") | {"precision": precision},
        "steps": spec.steps,
        "division": division,
        "base": base,
        "data": {name: mark for what, found in data.items() if found for name, mark in _marks(what, found)},
    }


def check_same(before: Identity, now: Identity, *, step: int) -> None:
    """Refuse to go on with another run than the one that was begun.

    Args:
        before: Of the run that wrote the checkpoint.
        now: Of this run.
        step: After which the checkpoint was written.

    Raises:
        TrainingError: Names all that differs.
    """
    problems = []
    if now["steps"] < step:
        problems.append(f"steps is {now['steps']}, fewer than the {step} that are done")
    problems += _differences(before, now)
    if problems:
        raise TrainingError(
            f"the run that was begun cannot go on, it has changed since: {'; '.join(problems)}. Put it back, "
            "or start anew without resume. Only these settings may change: "
            f"{', '.join(sorted(MAY_CHANGE))}."
        )


def in_step(spec: TrainSpec, own: Identity) -> Identity:
    """Return what the processes of one run must have in common: more than runs, so that they meet.

    Args:
        spec: The run.
        own: Its identity.
    """
    more = {"steps": spec.steps, "validate_every": spec.validate_every, "resume": spec.resume}
    return {**own, "settings": own["settings"] | own["division"] | more}


def check_alike(first: Identity, own: Identity, *, process: int) -> None:
    """Refuse to work on another run than the first process.

    Args:
        first: What ``in_step`` says in the first process.
        own: What it says here.
        process: Number of this process.

    Raises:
        TrainingError: Names all that differs.
    """
    if problems := _differences(first, own):
        raise TrainingError(
            f"process {process} was given another run than process 0: {'; '.join(problems)}. Start all with "
            "the same command, on the same data."
        )


def _differences(before: Identity, now: Identity) -> list[str]:
    old, new = before["settings"], now["settings"]
    problems = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    # Where settings differ, they are why pictures are treated otherwise.
    problems += _data_differences(before["data"], now["data"], treatment=not problems)
    if before["base"] != now["base"]:
        problems.append("the base model has other weights")
    return problems


def _data_differences(before: Mapping[str, str], now: Mapping[str, str], *, treatment: bool) -> list[str]:
    both = [(name, before[name].split("/"), now[name].split("/")) for name in before.keys() & now.keys()]
    changed = {name for name, (content, _), (other, _) in both if content != other}
    found = {
        "new pictures": now.keys() - before.keys(),
        "missing pictures": before.keys() - now.keys(),
        "changed pictures or captions": changed,
    }
    if treatment:
        treated = {name for name, (_, own), (_, other) in both if own != other}
        found["pictures with other settings of their folder"] = treated - changed
    return [f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names]


def _marks(what: str, found: PictureSet) -> list[tuple[str, str]]:
    """Return each picture's name and two hashes: ``<of pixels, mask and caption>/<of its treatment>``."""
    marks: dict[str, str] = {}
    for picture in found.pictures:
        name = f"{what}/{_name(picture.path, found.folder)}"
        # A picture may be in a set twice, in two folders of a data set file.
        before = marks.get(name, "/").split("/")
        own = _content(picture), repr((picture.repeats, picture.treatment))
        marks[name] = "/".join(
            hashlib.sha256(f"{former}{each}".encode()).hexdigest()
            for former, each in zip(before, own, strict=True)
        )
    return list(marks.items())


def _content(picture: Picture) -> str:
    files = [file_fingerprint(file) for file in (picture.path, picture.mask) if file is not None]
    return repr((files, picture.caption))


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else Path(path.parent.name, path.name))
