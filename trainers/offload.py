"""The networks that encode pictures and captions, on the CPU while a run does without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from studio.errors import TrainingError
from studio.trainers.borrow import networks
from studio.trainers.prompts import Prompts
from studio.trainers.step import Batches

CPU = torch.device("cpu")


class Encoders:
    """The autoencoder and the text encoders of a pipeline, which may rest once all is encoded.

    Args:
        pipe: The base, lent.
        batches: What the run sees.
        prompts: What encodes its captions.
        offload: Whether they are to rest.

    Attributes:
        resting: Names of those that rest during training.
        kept: Why others do not, by name.

    Raises:
        TrainingError: If they are to rest and all of them are needed at every step.
    """

    def __init__(
        self, pipe: DiffusionPipeline, batches: Batches, prompts: Prompts, *, offload: bool = False
    ) -> None:
        self._batches, self._prompts = batches, prompts
        self._device = next(pipe.unet.parameters()).device
        parts = encoders_of(pipe)
        self.kept: dict[str, str] = {}
        if not batches.pixels_recur:
            self.kept["vae"] = "pictures are cropped or coloured at random"
        needed = "they learn" if prompts.trained else "captions differ from sample to sample"
        if prompts.trained or batches.captions_vary:
            self.kept |= {name: needed for name in parts if name != "vae"}
        self.resting = [name for name in parts if offload and name not in self.kept]
        self._parts = [parts[name] for name in self.resting]
        if offload and not self.resting:
            reasons = " and ".join(dict.fromkeys(self.kept.values()))
            raise TrainingError(
                f"offload_encoders: none can be offloaded, as {reasons}: they are used at every step. Leave "
                "offload_encoders out."
            )

    def __str__(self) -> str:
        text = f"On the CPU while training: {', '.join(self.resting)}"
        kept = "; ".join(f"{name} stays, as {reason}" for name, reason in self.kept.items())
        useless = " (which the device is, so this frees no memory)" if self._device.type == "cpu" else ""
        return f"{text}{useless}{'; ' if kept else ''}{kept}."

    def rest(self, steps: range, tell: Callable[[str], None]) -> None:
        """Encode all that a run needs, and move those that rest to the CPU.

        Args:
            steps: Numbers of the run's steps, from 0.
            tell: Told what rests and what does not.
        """
        if not self.resting:
            return
        tell(str(self))
        if "vae" in self.resting:
            self._batches.encode(steps)
        if len(self.resting) > ("vae" in self.resting):
            self._prompts.encode(sorted(self._batches.recurring_captions), self._device)
        self._move(CPU)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have all of them where the UNet is for the length of a block; each where it was afterwards."""
        before = [next(part.parameters()).device for part in self._parts]
        try:
            self._move(self._device)
            yield
        finally:
            for part, device in zip(self._parts, before, strict=True):
                nn.Module.to(part, device)

    def _move(self, device: torch.device) -> None:
        for part in self._parts:
            nn.Module.to(part, device)


def encoders_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the autoencoder and the text encoders by component."""
    return {name: part for name, part in networks(pipe).items() if name == "vae" or "text_encoder" in name}


@contextmanager
def originals_on_cpu(pipe: DiffusionPipeline, wanted: bool) -> Iterator[None]:
    """Keep the encoders of a pipeline on the CPU for the length of a block; back where they were afterwards.

    A base that is lent keeps its own tensors aside, which would hold the GPU's memory while copies rest.
    """
    parts = list(encoders_of(pipe).values()) if wanted else []
    before = [next(part.parameters()).device for part in parts]
    try:
        for part in parts:
            nn.Module.to(part, CPU)
        yield
    finally:
        for part, device in zip(parts, before, strict=True):
            nn.Module.to(part, device)
