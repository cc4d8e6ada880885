"""Where and in which number type a run computes: device, precision, accelerate."""

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline

from studio.errors import TrainingError
from studio.models.device import resolve_device
from studio.specs.train import TrainSpec

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(spec: TrainSpec, pipe: DiffusionPipeline) -> torch.device:
    """Return the device asked for; ``auto`` is where the base is.

    Raises:
        UsageError: If this machine does not have it.
    """
    return next(pipe.unet.parameters()).device if spec.device == "auto" else resolve_device(spec.device)


def choose_precision(spec: TrainSpec, pipe: DiffusionPipeline, device: torch.device) -> Precision:
    """Return the number type of the forward pass.

    ``auto`` is fp32 on the CPU, on a GPU the base's own 16-bit type or else bf16 where the GPU has it.

    Raises:
        TrainingError: If the device cannot train in it.
    """
    if spec.precision == "auto":
        if device.type != "cuda":
            return "fp32"
        own: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        return own.get(pipe.unet.dtype, "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    if spec.precision == "fp16" and device.type != "cuda":
        raise TrainingError(f"precision fp16 cannot train on '{device.type}'. Use fp32, bf16 or auto.")
    return spec.precision


def weight_dtype(pipe: DiffusionPipeline, device: torch.device, precision: Precision) -> torch.dtype:
    """Return the number type in which the frozen base is held during training.

    In 16-bit runs it keeps its own type where autocast can work from it, so that nothing is copied;
    everything else is fp32, also a 16-bit base on the CPU.
    """
    own: torch.dtype = pipe.unet.dtype
    return own if precision != "fp32" and own == DTYPES[precision] and device.type != "cpu" else torch.float32


def make_accelerator(
    device: torch.device, precision: Precision, *, gradient_accumulation: int
) -> Accelerator:
    """Return an accelerator for one run.

    Raises:
        TrainingError: If the process is one of several that accelerate started.
    """
    if PartialState(cpu=device.type == "cpu").num_processes > 1:
        raise TrainingError(
            "training in several processes at once is not supported. Start it without accelerate launch."
        )
    # accelerate keeps the settings of the first run for the life of the process; a worker runs many.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=gradient_accumulation,
        # Modules and batches are placed by us: the base may be asked onto another GPU than the first.
        device_placement=False,
    )


@contextlib.contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Keep the global random state of the caller out of a run, and the run's out of the caller's."""
    cuda = device.type == "cuda"
    index = device.index if device.index is not None else 0
    with (
        torch.random.fork_rng(devices=[index] if cuda else []),
        torch.cuda.device(index) if cuda else contextlib.nullcontext(),
    ):
        yield


def rate_factor(spec: TrainSpec, step: int) -> float:
    """Return what the learning rate of optimizer step ``step``, counted from 0, is multiplied by: 0 to 1.

    A straight rise over ``warmup_steps``, then ``constant``, half a ``cosine`` or a ``linear`` fall that
    ends at 0 after the last step.
    """
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    if spec.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if spec.schedule == "linear" else 1.0
