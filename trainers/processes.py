"""Several processes that fit one adapter together, each with its share of every batch, or share other work.

All hold the same parameters and take the same steps; what they see differs, and gradients are averaged. The
first one alone writes the files of a training and tells of its events. Whoever fails says so where the others
meet next, so that none waits for one that has gone.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor, distributed, nn

from studio.errors import StudioError, TrainingError, UsageError

Result = TypeVar("Result")
WAIT = timedelta(hours=6)
"""How long a process waits for another: the first one may have many pictures to draw."""
BUCKET = 2**24
"""Numbers that are averaged at a time."""
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class Processes:
    """The processes of a run, seen from one of them. What is exchanged, all ask for in the same order.

    Args:
        index: Of this one among all.
        count: Of all.
        local: Index of this one among those of its machine.
    """

    def __init__(self, index: int = 0, count: int = 1, *, local: int = 0) -> None:
        self.index, self.count = index, count
        self._local = local
        self._over = False

    @property
    def main(self) -> bool:
        """Whether this is the first one."""
        return self.index == 0

    def own(self, device: torch.device, *, asked: str = "auto") -> torch.device:
        """Return where this one computes: of GPUs each has its own.

        Args:
            device: Where the run computes.
            asked: What the user said about that.

        Raises:
            TrainingError: If this machine has fewer GPUs than processes.
            UsageError: If the user named one GPU for all.
        """
        if self.count == 1 or device.type != "cuda":
            return device
        if ":" in asked:
            raise UsageError(
                f"device: '{asked}' is one GPU, and there are {self.count} processes, each takes its own. "
                "Leave device out, or say cuda."
            )
        if self._local >= torch.cuda.device_count():
            raise TrainingError(
                f"this machine has {torch.cuda.device_count()} GPUs for more processes than that. Start no "
                "more processes on it than it has GPUs."
            )
        return torch.device("cuda", self._local)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all get to the end of a block, or all fail.

        Raises:
            TrainingError: If another one has failed.
        """
        self._over = self.count == 1
        try:
            yield
            self.total(0.0)
        except Exception as error:
            if not self._over and self._main_fails_too(_words(error)) and not self.main:
                raise TrainingError(f"process {self.index} ends, as process 0 has failed.") from error
            raise

    def total(self, value: float) -> float:
        """Return the sum of a number over all, once all are here.

        Raises:
            TrainingError: If another one has failed, in all.
        """
        if self.count == 1:
            return value
        total, failures = self._meet(value, failed=False)
        if failures:
            texts = self._failures()
            number = next(number for number, text in enumerate(texts) if text)
            said = f": {texts[number]}" if self.main else "."
            raise TrainingError(f"process {number} has failed{said}")
        return total

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any of them."""
        return self.total(float(flag)) > 0

    def mean(self, value: float) -> float:
        """Return the mean of a number over all."""
        return self.total(value) / self.count

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Return what work returns here; the main process does it before the others begin."""
        if not self.main:
            self.total(0.0)
            return work()
        result = work()
        self.total(0.0)
        return result

    def main_says(self, value: Result) -> Result:
        """Return the main process's value, of which all have their own."""
        self.total(0.0)
        said = [value]
        if self.count > 1:
            distributed.broadcast_object_list(said, src=0)
        return said[0]

    @torch.no_grad()
    def equalize(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the parameters the main process's values: machines may differ in a rounding."""
        self.total(0.0)
        for parameter in parameters if self.count > 1 else ():
            distributed.broadcast(parameter.detach(), src=0)

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all, process after process; of each as many, ``[count * n, ...]``."""
        self.total(0.0)
        if self.count == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.count)]
        distributed.all_gather(found, rows.contiguous())
        return torch.cat(found)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their means over all. One that is missing counts as 0 unless it is so in all.

        Each loss is a mean over as many samples, so this is the gradient of the mean over all samples.
        """
        self.total(0.0)
        if self.count == 1:
            return
        present = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        distributed.all_reduce(present)
        gradients = []
        for parameter, number in zip(parameters, present.tolist(), strict=True):
            if number and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            flat /= self.count
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _meet(self, value: float, *, failed: bool) -> tuple[float, int]:
        """Exchange the one message that all meetings consist of: sum of the values, number of failures."""
        message = torch.tensor([value, float(failed)], dtype=torch.float64)
        try:
            distributed.all_reduce(message)
        except RuntimeError as error:
            self._over = True
            raise TrainingError(
                f"process {self.index} has lost the others: one has ended, or cannot be reached any more "
                f"({str(error).splitlines()[0]}). Its own message says why."
            ) from None
        return float(message[0]), int(message[1])

    def _main_fails_too(self, text: str) -> bool:
        """Tell the others why this one fails; return whether the main process does, at the same time."""
        try:
            self._meet(0.0, failed=True)
            return bool(self._failures(text)[0])
        except (RuntimeError, TrainingError):
            # There is nobody left to tell, and the failure itself is what matters.
            return False

    def _failures(self, own: str = "") -> list[str]:
        """Return what each has failed for, empty where it has not; after that nobody meets anybody."""
        self._over = True
        texts: list[Any] = [""] * self.count
        distributed.all_gather_object(texts, own)
        return texts


ALONE = Processes()


def join(device: torch.device) -> Processes:
    """Return the processes that this one was started with, of accelerate's launcher or another.

    Called at the start of every run: accelerate keeps its settings for the life of the process.

    Args:
        device: Where the run is to compute.

    Raises:
        TrainingError: If they were started in a way that a run cannot use.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    cpu = device.type == "cpu"
    _check_launch(cpu)
    launched = "LOCAL_RANK" in os.environ
    # Numbers that only the processes need are exchanged on the CPU, gradients where they are.
    backend = {"backend": "cuda:nccl,cpu:gloo"} if launched and device.type == "cuda" else {}
    known = distributed.is_initialized()
    state = PartialState(cpu=cpu, timeout=WAIT, **backend)
    if distributed.is_initialized() and not known:
        atexit.register(_leave)
    several = max(state.num_processes, int(os.environ.get("WORLD_SIZE", "1"))) > 1
    if several and state.distributed_type != (
        DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU
    ):
        raise TrainingError(
            f"several processes can work together on CPUs or on NVIDIA GPUs, not on '{device}' "
            f"({state.distributed_type}). Give --device cpu, or start one process."
        )
    return Processes(state.process_index, state.num_processes, local=max(0, state.local_process_index))


def _check_launch(cpu: bool) -> None:
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise TrainingError(
                f"accelerate's settings ask for {name}, which takes parameters apart that the methods need "
                "whole. Choose plain data parallelism, accelerate launch --multi_gpu."
            )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return
    if not cpu:
        raise TrainingError(
            "accelerate was told --cpu, the device is a GPU. Give --device cpu to studio, too."
        )
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if "MASTER_PORT" in os.environ and not any(name in os.environ for name in counts):
        raise TrainingError(
            "accelerate launch --cpu was asked for several processes and started one: for more it needs MPI. "
            "Put --multi_gpu in place of its --cpu, and give --device cpu to studio."
        )


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _words(error: Exception) -> str:
    text = str(error) or "no message"
    return text if isinstance(error, StudioError) else f"{type(error).__name__}: {text}"


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in groups of about as many numbers; a larger one is a group of its own."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
