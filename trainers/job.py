"""What a run works on, whom it tells, and the files that it leaves on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.adapters.header import tensor_hash
from studio.adapters.metadata import now
from studio.registry import TRAINERS
from studio.specs import AdapterUse, GenerateSpec
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.borrow import converted
from studio.trainers.identity import Identity
from studio.trainers.metadata import progress_facts
from studio.trainers.outputs import part_paths, save_trained
from studio.trainers.processes import Processes
from studio.trainers.run_folder import RunFolder
from studio.trainers.runtime import DTYPES

SampleFunction = Callable[
    [DiffusionPipeline, Adapter | None, Sequence[GenerateSpec], Sequence[Path]], list[Image.Image]
]
"""Draws a batch of pictures: pipeline (the plain base), adapter so far or None, what to draw (only prompt and
seed differ; the adapters that it names are those files' one adapter), a file to write for each or none."""


@dataclass(frozen=True)
class Job:
    """What a run works on and whom it tells.

    Attributes:
        pipe: The base, lent.
        spec: What to do.
        facts: Metadata of every adapter that it writes.
        identity: What a run that goes on from this one must have in common with it.
        num_pictures: How many samples an epoch has.
        samples: The sample pictures, without adapters.
        on_event: Told what happens.
        sample: Draws the sample pictures.
        processes: Those that work on it.
        started: When, in seconds since 1970.
    """

    pipe: DiffusionPipeline
    spec: TrainSpec
    facts: Mapping[str, str]
    identity: Identity
    num_pictures: int
    samples: Sequence[GenerateSpec]
    on_event: OnEvent
    sample: SampleFunction | None
    processes: Processes
    started: float = field(default_factory=now)

    @property
    def folder(self) -> RunFolder:
        """Where all lies but the adapter."""
        return RunFolder(self.spec.output)

    def tell(self, message: str, *, step: int = 0) -> None:
        """Send a line for the log."""
        self.on_event(Event(kind="message", message=message, step=step, total=self.spec.steps))

    def described(self, adapter: Adapter, *, step: int) -> Adapter:
        """Return an exported adapter with the metadata of its file."""
        progress = progress_facts(
            self.spec, steps=step, pictures=self.num_pictures, processes=self.processes.count
        )
        metadata = {**adapter.metadata, **self.facts, **progress}
        return replace(adapter, name=self.spec.output.stem, metadata=metadata)

    def save(self, adapter: Adapter, path: Path, *, step: int) -> None:
        """Write an adapter on the way and its parts.

        Raises:
            AdapterError: If the format cannot hold the adapter.
            OutputError: If a file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        files = save_trained(adapter, path, self.spec, base=self.pipe, started=self.started, overwrite=True)
        for part, file in files.items():
            self.on_event(Event(kind="saved", step=step, total=self.spec.steps, path=file, part=part))

    def draw(self, adapter: Adapter | None, *, step: int) -> None:
        """Draw the sample pictures on the plain base with an adapter, as who has its file would."""
        assert self.sample is not None
        dtype = self.pipe.unet.dtype
        made_with = {
            "precision": next(name for name, known in DTYPES.items() if known == dtype),
            **self._ingredients(step if adapter else 0),
        }
        self.folder.samples.mkdir(parents=True, exist_ok=True)
        # Pipelines expect the autoencoder in the UNet's number type.
        with converted(self.pipe.vae, dtype):
            for number, request in enumerate(self.samples):
                path = self.folder.sample(step, number)
                self.sample(self.pipe, adapter, [request.model_copy(update=made_with)], [path])
                self.on_event(
                    Event(kind="sample", message=request.prompt, step=step, total=self.spec.steps, path=path)
                )

    def _ingredients(self, step: int) -> dict[str, Any]:
        """Return as fields what a picture after a step is made of, with the hashes of what is written.

        Where no adapter is written at that step, it is named by the file that would have been.
        """
        files: list[Path] = []
        if step:
            ends = step == self.spec.steps and not self.spec.average_last
            own = self.spec.output if ends else self.folder.adapter(step)
            parts = part_paths(own, self.spec)
            files = [own, *(parts[word] for word in TRAINERS[self.spec.method].companions if word in parts)]
        # What lies at the output is not this run's before its end.
        written = [file for file in files if file.parent == self.folder.adapters and file.is_file()]
        return {
            "adapters": tuple(AdapterUse(path=file) for file in files),
            "expected_hashes": {
                self.spec.base: self.identity["base"],
                **{str(file): tensor_hash(file) for file in written},
            },
        }
