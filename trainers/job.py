"""What a run works on, whom it tells, and the files that it leaves on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from studio.adapters.adapter import Adapter
from studio.specs.events import Event, OnEvent
from studio.specs.train import TrainSpec
from studio.trainers.borrow import converted
from studio.trainers.identity import Identity
from studio.trainers.metadata import progress_facts
from studio.trainers.outputs import save_trained
from studio.trainers.processes import Processes
from studio.trainers.run_folder import RunFolder

SampleFunction = Callable[
    [DiffusionPipeline, Adapter | None, Sequence[str], Sequence[int]], list[Image.Image]
]
"""Draws a batch of pictures: pipeline (the plain base), adapter so far or None, prompts, a seed for each."""


@dataclass(frozen=True)
class Job:
    """What a run works on and whom it tells.

    Attributes:
        pipe: The base, lent.
        spec: What to do.
        facts: Metadata of every adapter that it writes.
        identity: What a run that goes on from this one must have in common with it.
        num_pictures: How many samples an epoch has.
        sample_prompt: Prompt of the samples where none is given.
        on_event: Told what happens.
        sample: Draws the sample pictures.
        processes: Those that work on it.
    """

    pipe: DiffusionPipeline
    spec: TrainSpec
    facts: Mapping[str, str]
    identity: Identity
    num_pictures: int
    sample_prompt: str
    on_event: OnEvent
    sample: SampleFunction | None
    processes: Processes

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
        for written in save_trained(adapter, path, self.spec, base=self.pipe, overwrite=True):
            self.on_event(Event(kind="saved", step=step, total=self.spec.steps, path=written))

    def draw(self, adapter: Adapter | None, *, step: int) -> None:
        """Draw the sample pictures on the plain base with an adapter, as who has its file would."""
        assert self.sample is not None
        # Pipelines expect the autoencoder in the UNet's number type.
        with converted(self.pipe.vae, self.pipe.unet.dtype):
            for number, prompt in enumerate(self.spec.sample_prompts or (self.sample_prompt,)):
                (image,) = self.sample(self.pipe, adapter, [prompt], [self.spec.seed])
                path = self.folder.sample(step, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                self.on_event(
                    Event(kind="sample", message=prompt, step=step, total=self.spec.steps, path=path)
                )
