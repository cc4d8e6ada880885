"""Too little memory for a run: what takes less, and what is kept of it."""

from contextlib import AbstractContextManager

import torch

from studio.errors import memory_told
from studio.registry import TRAINERS
from studio.specs.train import TrainSpec
from studio.trainers.checkpoint import Checkpoints
from studio.trainers.run_folder import RunFolder


def shortage_told(spec: TrainSpec, device: torch.device) -> AbstractContextManager[None]:
    """Put one message in the place of an error that too little memory raises in a block of a run.

    Raises:
        MemoryShortage: In its place; says what takes less, and what of the run is kept.
    """
    return memory_told(lambda: f"{ways_out(spec, device)}{_kept(spec)}")


def ways_out(spec: TrainSpec, device: torch.device) -> str:
    """Return in sentences what would have a run take less memory, of what it does not do yet."""
    on_gpu = device.type != "cpu"
    samples = spec.batch_size * spec.gradient_accumulation
    quantizable = TRAINERS[spec.method].refuses_quantized(spec.options, "nf4") is None
    ways = {
        f"batch_size 1 with gradient_accumulation {samples}, for as many samples a step": spec.batch_size > 1,
        "gradient_checkpointing": not spec.gradient_checkpointing,
        "attention auto": spec.attention == "eager",
        "offload_encoders": on_gpu and not spec.offload_encoders and spec.cache != "off",
        "fewer other programs beside it": not on_gpu,
    }
    anew = {
        "a lower resolution": True,
        "quantize_base nf4": on_gpu and spec.quantize_base == "none" and quantizable,
        "optimizer adamw8bit": on_gpu and spec.optimizer == "adamw",
        "the preset 8gb, which sets all of it": on_gpu and quantizable,
    }
    known, more = (", ".join(name for name, of_use in each.items() if of_use) for each in (ways, anew))
    return f"{f'Less is taken with: {known}. ' if known else ''}For a new run also: {more}."


def _kept(spec: TrainSpec) -> str:
    """Return a sentence on the last checkpoint of this run, empty where there is none."""
    folder = RunFolder(spec.output)
    checkpoints = Checkpoints(folder.checkpoints, keep=spec.keep_checkpoints)
    steps = checkpoints.steps()
    if not steps or not folder.is_of(spec):
        return ""
    path = checkpoints.path(steps[-1])
    return f" The checkpoint after step {steps[-1]} is kept, {path}: resume goes on from it."
