"""Where and in which number type a run computes: device, precision, accelerate."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType
from diffusers import DiffusionPipeline

from studio.errors import TrainingError
from studio.models.activations import fewer_kept
from studio.models.clip_skip import check_clip_skip, clip_skipped
from studio.models.device import has_bf16, resolve_device
from studio.models.execution import attention, check_attention, compiled
from studio.models.quantization import quantization_of
from studio.registry import nearest
from studio.specs.train import TrainSpec
from studio.trainers.offload import originals_on_cpu

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RESTARTS = 3
POWER = 2.0


def choose_device(spec: TrainSpec, pipe: DiffusionPipeline) -> torch.device:
    """Return the device asked for; ``auto`` is where the base is.

    Raises:
        UsageError: If this machine does not have it.
    """
    return next(pipe.unet.parameters()).device if spec.device == "auto" else resolve_device(spec.device)


def best_precision(device: torch.device) -> Precision:
    """Return the number type to train in where none is asked for."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"


def choose_precision(spec: TrainSpec, pipe: DiffusionPipeline, device: torch.device) -> Precision:
    """Return the number type of the forward pass.

    ``auto`` is the best for the device, but on a GPU a base in 16 bits is trained in its own type.

    Raises:
        TrainingError: If the device cannot train in it.
    """
    if spec.precision == "auto":
        own: dict[torch.dtype, Precision] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        best = best_precision(device)
        return best if best == "fp32" else own.get(pipe.unet.dtype, best)
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
    device: torch.device,
    precision: Precision,
    *,
    gradient_accumulation: int,
    tracker: str | None = None,
    folder: Path | None = None,
) -> Accelerator:
    """Return an accelerator for one run, whose processes have joined.

    Args:
        device: Where it computes.
        precision: Number type of the forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        tracker: accelerate's name of a tracker, or None.
        folder: Where the tracker writes its files.

    Raises:
        TrainingError: If the tracker is unknown or not installed.
    """
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    if tracker is not None and tracker not in known:
        raise TrainingError(
            f"tracker '{tracker}' is unknown.{nearest(tracker, known)} Known: {', '.join(known)}."
        )
    if tracker is not None and LoggerType(tracker) not in get_available_trackers():
        raise TrainingError(f"tracker '{tracker}' is not installed. Run pip install {tracker}.")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        # A plain number would give way to what accelerate's launcher says.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=gradient_accumulation),
        # Modules and batches are placed by us: the base may be asked onto another GPU than the first.
        device_placement=False,
        log_with=tracker,
        project_dir=folder,
    )
    if tracker is not None:
        accelerator.init_trackers("run")
    return accelerator


def check_execution(pipe: DiffusionPipeline, spec: TrainSpec, device: torch.device) -> None:
    """Check that the base can read prompts and compute as asked and is held as asked.

    Raises:
        UsageError: If the base cannot read prompts so, or attention cannot be computed so on this machine.
        TrainingError: If the base's weights are in another form.
    """
    check_clip_skip(pipe, spec.clip_skip)
    check_attention(spec.attention, device)
    own = quantization_of(pipe.unet)
    if own != spec.quantize_base:
        raise TrainingError(
            f"quantize_base is '{spec.quantize_base}', the base given was loaded with '{own}'. Load it with "
            f"load_base(..., quantize_base='{spec.quantize_base}'), or set the field to '{own}'."
        )


@contextlib.contextmanager
def execution(pipe: DiffusionPipeline, spec: TrainSpec) -> Iterator[None]:
    """Have a base read prompts, compute and lie as asked for the length of a run; afterwards as before."""
    with (
        clip_skipped(pipe, spec.clip_skip),
        attention(pipe.unet, spec.attention),
        fewer_kept(pipe.unet),
        compiled(pipe.unet, spec.compile),
        originals_on_cpu(pipe, spec.offload_encoders),
    ):
        yield


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


def seed_random_state(device: torch.device, seed: int) -> None:
    """Seed the random state that ``own_random_state`` keeps apart.

    ``torch.manual_seed`` would reach into all other devices as well.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def turn_checkpointing_on(parts: Sequence[Any]) -> None:
    """Have networks of diffusers and transformers trade time for memory in the backward pass."""
    for part in dict.fromkeys(parts):
        # transformers renamed it within version 5.
        names = (
            "enable_gradient_checkpointing",
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )
        next(getattr(part, name) for name in names if hasattr(part, name))()


def rate_factor(spec: TrainSpec, step: int) -> float:
    """Return what the learning rate of optimizer step ``step``, counted from 0, is multiplied by: 0 to 1.

    A straight rise over ``warmup_steps``, then ``constant``, half a ``cosine``, several halves one after the
    other (``restarts``, arXiv:1608.03983), a ``linear`` fall or one along a power (``polynomial``). All but
    the first end at 0 after the last step.
    """
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    if spec.schedule == "restarts" and done < 1:
        done = done * (spec.schedule_restarts or RESTARTS) % 1.0
    if spec.schedule in ("cosine", "restarts"):
        return 0.5 * (1 + math.cos(math.pi * done))
    powers = {"constant": 0.0, "linear": 1.0, "polynomial": spec.schedule_power or POWER}
    return float((1 - done) ** powers[spec.schedule])
