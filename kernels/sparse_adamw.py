"""One AdamW step over chosen entries of many weights, whose other entries never move.

The entries ``theta = W.flatten()[indices]`` of all weights W are one fp32 vector with gradient g. Step t:

    theta <- theta (1 - lr weight_decay)
    m     <- m + (1 - beta1) (g - m)
    v     <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    W.flatten()[indices] <- round(theta)

AdamW, arXiv:1711.05101, Alg. 2, with one lr for decay and step as in torch.optim.AdamW; to train only chosen
entries is SaRA's, arXiv:2409.06633. The fp32 vector is the master copy: a 16-bit weight is rounded from it at
each step, so that changes below the weight's last place add up. Kept between steps are indices, values and
two moments, 16 bytes per chosen entry, and nothing for the others. While the torch backend works it allocates
4 MiB at most.
"""

import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from studio.kernels.entries import axes, check_apart, check_bounds, check_indices, memory, places

if TYPE_CHECKING:
    from studio.kernels.sparse_adamw_triton import Tables

# Entries that the torch backend works on at a time: they stay in a processor's cache from the first operation
# to the last, and bound what is allocated.
CHUNK = 2**17
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_AXES = 4


def gather(dense: Tensor, indices: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """Return the chosen entries of a tensor as fp32.

    Args:
        dense: Tensor of any shape, strides and floating dtype; never written to.
        indices: Positions ``[n]`` int32 in the row-major order of ``dense.shape``, whatever its strides.
        out: Where to put the entries: fp32 ``[n]``, contiguous. Allocated if not given.
        accumulate: Add to ``out`` instead of replacing what it holds.

    Raises:
        ValueError: If dtypes, shapes or devices do not fit, or, on the CPU, a position is out of range.
            Elsewhere that check would make the host wait; SparsePlan makes it once.
    """
    _check_positions(dense, indices)
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True adds to 'out', which is not given. Pass out=.")
        out = torch.empty(indices.shape, dtype=torch.float32, device=dense.device)
    _check_vector(out, indices.numel(), dense.device, name="out")
    source, target = memory(dense), out.detach()
    for part in _chunks(indices.numel()):
        entries = source.index_select(0, places(dense, indices[part])).view(dense.dtype).float()
        if accumulate:
            target[part].add_(entries)
        else:
            target[part].copy_(entries)
    return out


def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values over the chosen entries of a tensor, in place.

    Args:
        dense: Tensor of any shape, strides and floating dtype, no two entries of which share memory.
        indices: Positions ``[n]`` int32 in the row-major order of ``dense.shape``, each at most once.
        values: New entries ``[n]`` of a floating dtype, rounded once to the tensor's dtype.

    Raises:
        ValueError: As for gather, or if entries of ``dense`` share memory.
    """
    _check_positions(dense, indices)
    check_apart(dense, name="dense")
    if values.shape != indices.shape or values.device != dense.device or not values.is_floating_point():
        raise ValueError(
            f"values must be {tuple(indices.shape)} of a floating dtype on {dense.device}, "
            f"got {tuple(values.shape)} {values.dtype} on {values.device}"
        )
    _write(dense, indices, values.detach())


def sparse_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """Make one AdamW step on the chosen entries and write them into the weights, in place.

    It is ``SparsePlan(weights, indices).adamw_(...)``. To make a plan reads all indices: loops keep it.

    Args:
        weights: Tensors to write into, as SparsePlan wants them.
        indices: One int32 vector of positions per weight, as SparsePlan wants them; it may be empty.
        values: Chosen entries, weight after weight: fp32 ``[N]``, N the sum of the lengths.
        grads: Gradients, fp32 ``[N]``; never written to.
        exp_avg: First moments, fp32 ``[N]``; zero before step 1.
        exp_avg_sq: Second moments, fp32 ``[N]``; zero before step 1.
        step: Number of this step, from 1.
        lr: Learning rate of this step.
        betas: Decay of the first and second moments, in [0, 1).
        eps: Added to the root of the second moments.
        weight_decay: Decoupled decay, in units of ``lr``.

    Raises:
        ValueError: If a tensor does not fit or a number is out of range.

    AdamW, arXiv:1711.05101, Alg. 2; SaRA, arXiv:2409.06633.
    """
    SparsePlan(weights, indices).adamw_(
        values,
        grads,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )


@dataclass(frozen=True)
class StepFactors:
    """The numbers of one step, in double precision; each is rounded to fp32 where it meets a tensor."""

    decay: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    root_correction: float
    eps: float
    step_size: float

    @classmethod
    def of(
        cls, *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> "StepFactors":
        """Return the factors of a step.

        Raises:
            ValueError: If a number is out of range.
        """
        if step < 1:
            raise ValueError(f"step counts from 1, got {step}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {number}")
        beta1, beta2 = betas
        return cls(
            decay=1 - lr * weight_decay,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            root_correction=(1 - beta2**step) ** 0.5,
            eps=eps,
            step_size=lr / (1 - beta1**step),
        )


class SparsePlan:
    """Weights and those of their entries that are trained: checked once, used at every step.

    Attributes:
        weights: Tensors that are written into.
        indices: One int32 vector of positions per weight.
        segments: The part of the flat vectors that belongs to each weight.
        size: Number N of chosen entries.
    """

    def __init__(self, weights: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
        """Check weights and indices; on CUDA the host waits once for the answer.

        Args:
            weights: Tensors on one device, of any shape, strides and floating dtype. Their data may be
                replaced between steps (``weight.data = ...``), as a change of dtype or memory format does.
            indices: One int32 vector per weight, strictly ascending, so that no entry is named twice. They
                are kept, not copied.

        Raises:
            ValueError: If counts, dtypes or devices do not fit, positions are out of range or not ascending,
                or entries of a weight share memory.
        """
        if len(weights) != len(indices):
            raise ValueError(
                f"one vector of indices per weight is wanted, got {len(indices)} for {len(weights)}"
            )
        self.weights, self.indices = tuple(weights), tuple(indices)
        ends = list(itertools.accumulate((vector.numel() for vector in indices), initial=0))
        self.segments = tuple(slice(start, end) for start, end in itertools.pairwise(ends))
        self.size = ends[-1]
        self._shapes = [weight.shape for weight in weights]
        self._layout: list[tuple[object, ...]] | None = None
        self._reason: str | None = None
        self._tables: Tables | None = None
        self._follow()
        _check_ascending(self.weights, self.indices)

    def why_not_triton(self) -> str | None:
        """Return why the Triton kernel does not apply to these weights, or None if it does."""
        on_cuda = all(weight.is_cuda for weight in self.weights)
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the weights lie on {self.weights[0].device}, the kernel runs on CUDA"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        for number, (weight, positions) in enumerate(zip(self.weights, self.indices, strict=True)):
            if weight.dtype not in TRITON_DTYPES:
                return f"weight {number} is {weight.dtype}, the kernel writes fp32, fp16 and bf16"
            if len(axes(weight)) > TRITON_AXES:
                return (
                    f"weight {number} has {len(axes(weight))} axes apart in memory, at most {TRITON_AXES} fit"
                )
            if not positions.is_contiguous():
                return f"indices {number} are not contiguous"
        return None

    def adamw_(
        self,
        values: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        backend: Literal["auto", "torch", "triton"] = "auto",
    ) -> None:
        """Make one AdamW step on the chosen entries and write them into the weights, in place.

        Args:
            values, grads, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay: As for sparse_adamw_.
            backend: ``auto`` takes Triton where it applies and torch elsewhere.

        Raises:
            ValueError: If a tensor does not fit, a number is out of range, or Triton is asked for where it
                does not apply.
        """
        self._follow()
        device = self.weights[0].device if self.weights else values.device
        vectors = {"values": values, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        for name, vector in vectors.items():
            _check_vector(vector, self.size, device, name=name)
        factors = StepFactors.of(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if backend == "triton" and self._reason:
            raise ValueError(f"backend 'triton' does not apply: {self._reason}. Use backend='auto'.")
        if not self.size:
            return
        theta, g, m, v = (vector.detach() for vector in vectors.values())
        if backend == "torch" or self._reason:
            _step(theta, g, m, v, factors)
            for weight, positions, segment in zip(self.weights, self.indices, self.segments, strict=True):
                _write(weight, positions, theta[segment])
            return
        from studio.kernels.sparse_adamw_triton import launch, make_tables

        self._tables = self._tables or make_tables(self)
        launch(self._tables, theta, g, m, v, factors)

    def _follow(self) -> None:
        # What the tables hold of the weights changes when their data is replaced.
        layout: list[tuple[object, ...]] = [
            (weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride())
            for weight in self.weights
        ]
        if layout == self._layout:
            return
        for number, (weight, positions) in enumerate(zip(self.weights, self.indices, strict=True)):
            if weight.shape != self._shapes[number]:
                raise ValueError(
                    f"weight {number} is {tuple(weight.shape)} and was {tuple(self._shapes[number])} when "
                    "the plan was made. Make a new plan."
                )
            check_indices(weight, positions, name=f"indices {number}")
            check_apart(weight, name=f"weight {number}")
        devices = sorted({str(weight.device) for weight in self.weights})
        if len(devices) > 1:
            raise ValueError(f"weights must lie on one device, got {' and '.join(devices)}")
        self._layout, self._reason, self._tables = layout, self.why_not_triton(), None


def _step(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: StepFactors) -> None:
    for part in _chunks(theta.numel()):
        # The operations of torch.optim.AdamW and their order, so that the results are its bits.
        theta[part].mul_(factors.decay)
        m[part].lerp_(g[part], factors.one_minus_beta1)
        v[part].mul_(factors.beta2).addcmul_(g[part], g[part], value=factors.one_minus_beta2)
        denominator = v[part].sqrt().div_(factors.root_correction).add_(factors.eps)
        theta[part].addcdiv_(m[part], denominator, value=-factors.step_size)


def _write(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    target = memory(dense)
    for part in _chunks(indices.numel()):
        entries = values[part].to(dense.dtype).view(target.dtype)
        target.scatter_(0, places(dense, indices[part]).long(), entries)


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def _check_positions(dense: Tensor, indices: Tensor) -> None:
    check_indices(dense, indices, name="indices")
    if indices.is_cpu and indices.numel():
        low, high = indices.aminmax()
        check_bounds(dense, int(low), int(high), name="indices")


def _check_ascending(weights: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    chosen = [number for number, vector in enumerate(indices) if vector.numel()]
    facts = [
        torch.stack([vector[0], vector[-1], (vector[1:] > vector[:-1]).all().int()])
        for vector in (indices[number] for number in chosen)
    ]
    if not facts:
        return
    # One transfer for all of them.
    for number, (first, last, ascending) in zip(chosen, torch.stack(facts).tolist(), strict=True):
        if not ascending:
            raise ValueError(
                f"indices {number} must be strictly ascending. Sort them and name each entry once."
            )
        check_bounds(weights[number], first, last, name=f"indices {number}")


def _check_vector(vector: Tensor, size: int, device: torch.device, *, name: str) -> None:
    fits = vector.shape == (size,) and vector.dtype == torch.float32 and vector.device == device
    if not fits or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous fp32 vector of {size} on {device}, got {tuple(vector.shape)} "
            f"{vector.dtype} on {vector.device} with strides {vector.stride()}"
        )
