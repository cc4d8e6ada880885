"""The folder beside an adapter's file that holds all else of its run.

``<output>-run/`` holds ``spec.toml`` (what was asked for), ``log.jsonl`` (what happened), ``samples/``,
``adapters/`` (those on the way), ``checkpoints/`` (what the run can go on from), ``class/`` (class pictures
that it drew), ``tracker/`` and ``.lock`` (keeps other runs out while one is at work).
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomlkit
from filelock import FileLock, Timeout
from pydantic import BaseModel

from studio.errors import OutputError
from studio.specs.events import Event
from studio.specs.train import TrainSpec

_STEP = re.compile(r"-step-(\d+)\b")


class RunFolder:
    """The places in the folder of one run.

    Args:
        output: The adapter's file.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self.path = output.with_name(f"{output.stem}-run")
        self.spec = self.path / "spec.toml"
        self.log = self.path / "log.jsonl"
        self.samples = self.path / "samples"
        self.adapters = self.path / "adapters"
        self.checkpoints = self.path / "checkpoints"
        self.class_pictures = self.path / "class"
        self.tracker = self.path / "tracker"

    def check(self, spec: TrainSpec) -> None:
        """Refuse to mix two runs.

        Raises:
            OutputError: If the folder holds what an earlier run made, unless that is to go on or be replaced.
        """
        if not spec.resume:
            self._check_inputs(spec)
        if spec.may_replace:
            return
        for folder in (self.checkpoints, self.adapters, self.samples):
            if folder.is_dir() and any(folder.iterdir()):
                raise OutputError(
                    f"{folder} exists, of an earlier run. Choose another output, go on with that run "
                    "(resume, --resume), or replace it (overwrite, --overwrite)."
                )

    def begin(self, spec: TrainSpec) -> None:
        """Write what was asked for; remove what an earlier run made, unless it goes on.

        Class pictures stay, they are known by what they were drawn from, and so does the log.

        Raises:
            OutputError: If the folder cannot be written, or holds what the run reads or another run made.
        """
        self.check(spec)
        try:
            if not spec.resume:
                for folder in self._replaced:
                    shutil.rmtree(folder, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            self.spec.write_text(as_toml(spec), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder for the length of a block, also those of other processes.

        Raises:
            OutputError: If another run is in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"another run is writing to {self.path}. Choose another output, or wait for its end."
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def _replaced(self) -> tuple[Path, ...]:
        """What an earlier run made that is removed when another takes its place."""
        return self.checkpoints, self.adapters, self.samples, self.tracker

    def _check_inputs(self, spec: TrainSpec) -> None:
        """Refuse to remove what a run is to read."""
        for name in ("data", "class_data", "validation_data", "start_from"):
            given: Path | None = getattr(spec, name)
            if given is not None and any(
                given.resolve().is_relative_to(folder.resolve()) for folder in self._replaced
            ):
                raise OutputError(
                    f"{name}: {given} lies in the folder of an earlier run, {self.path}, which this run "
                    "would replace. Choose another output, or copy it to another folder first."
                )

    def is_of(self, spec: TrainSpec) -> bool:
        """Return whether the run that lies here is one of a specification."""
        return self.spec.is_file() and self.spec.read_text(encoding="utf-8") == as_toml(spec)

    def record(self, event: Event) -> None:
        """Add an event to the log, on a line of its own whatever a killed process left behind.

        Raises:
            OutputError: If it cannot be written.
        """
        facts = event.model_copy(update={"path": None if event.path is None else event.path.absolute()})
        line = facts.model_dump_json(exclude_defaults=True)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.log.open("a+b") as file:
                file.seek(max(0, file.seek(0, 2) - 1))
                torn = file.read(1) not in (b"", b"\n")
                file.write(("\n" if torn else "").encode() + f'{{"time":"{now}",{line[1:]}\n'.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def adapter(self, step: int, what: str = "step") -> Path:
        """Return the file of the adapter as it is after a step."""
        return self.adapters / f"{self._output.stem}-{what}-{step:06d}{self._output.suffix}"

    @property
    def best_adapter(self) -> Path:
        """The file of the adapter whose loss on the pictures held out was the lowest."""
        return self.adapters / f"{self._output.stem}-best{self._output.suffix}"

    def sample(self, step: int, number: int) -> Path:
        """Return the file of a sample picture after a step."""
        return self.samples / f"{step:06d}-{number}.png"

    def prune_adapters(self, keep: int) -> None:
        """Remove the adapters on the way but those of the last ``keep`` steps; 0 keeps all."""
        found: dict[int, list[Path]] = {}
        for file in self.adapters.glob(f"{self._output.stem}-step-*{self._output.suffix}"):
            if matched := _STEP.search(file.stem.removeprefix(self._output.stem)):
                found.setdefault(int(matched[1]), []).append(file)
        for step in sorted(found)[:-keep] if keep else ():
            for file in found[step]:
                file.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"the run's folder {self.path} cannot be written: {error.strerror or error}. Free space, or "
            "choose another output."
        )


def as_toml(spec: TrainSpec) -> str:
    """Return a specification as a file that ``studio train --config`` takes.

    Paths are absolute, so that it means the same from everywhere; what says how the run relates to an
    earlier one is left out.
    """
    values = spec.model_dump(mode="json", exclude={"options", "overwrite", "resume"})
    for name in values:
        if isinstance(given := getattr(spec, name), Path):
            values[name] = str(given.absolute())
    return tomlkit.dumps(
        _worded(values, spec) | {"options": _worded(spec.options.model_dump(), spec.options)}
    )


def _worded(values: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """Leave out defaults of None, for which TOML has no word, and write other Nones as ``none``."""
    fields = type(model).model_fields
    return {
        name: "none" if value is None else value
        for name, value in values.items()
        if value is not None or fields[name].default is not None
    }
