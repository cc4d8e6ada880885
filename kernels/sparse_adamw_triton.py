"""The AdamW step over chosen entries as one Triton kernel: one launch for all weights.

Each program takes ``BLOCK`` entries of one weight, forms the step of ``sparse_adamw`` in fp32 and writes the
new entries, rounded once, to where the weight keeps them, whatever its strides. Tables tell it where that is;
they are made once, and again when a weight's data was replaced.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from studio.kernels.entries import axes

if TYPE_CHECKING:
    from studio.kernels.sparse_adamw import SparsePlan, StepFactors

BLOCK = 1024
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A row of the table of weights: address of the weight, address of its indices, dtype code, number of chosen
# entries, their start in the flat vectors, stride of the outermost axis, size and stride of three inner axes.
ROW = tl.constexpr(12)


@dataclass(frozen=True)
class Tables:
    """What the kernel reads besides the vectors.

    Attributes:
        weights: int64 ``[weights, ROW]``.
        blocks: int64 ``[programs, 2]``: row of the weight, first entry within its segment.
    """

    weights: Tensor
    blocks: Tensor


def make_tables(plan: "SparsePlan") -> Tables:
    """Return the tables of a plan, on its device."""
    device = plan.weights[0].device
    rows, blocks = [], []
    for weight, positions, segment in zip(plan.weights, plan.indices, plan.segments, strict=True):
        (_, outer), *inner = axes(weight) or [(1, 1)]
        # A missing axis has one entry: it divides and adds nothing.
        shape = [number for axis in [*[(1, 0)] * (3 - len(inner)), *inner] for number in axis]
        address = weight.data_ptr(), positions.data_ptr()
        size = positions.numel()
        rows.append([*address, DTYPE_CODES[weight.dtype], size, segment.start, outer, *shape])
        starts = torch.arange(0, size, BLOCK)
        blocks.append(torch.stack([torch.full_like(starts, len(rows) - 1), starts], dim=1))
    return Tables(torch.tensor(rows).to(device), torch.cat(blocks).to(device))


def launch(tables: Tables, theta: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: "StepFactors") -> None:
    """Make one step on the flat fp32 vectors and write the new entries into the weights."""
    with torch.cuda.device_of(theta):
        _step[(tables.blocks.shape[0],)](
            tables.weights,
            tables.blocks,
            theta,
            g,
            m,
            v,
            factors.decay,
            factors.one_minus_beta1,
            factors.beta2,
            factors.one_minus_beta2,
            factors.root_correction,
            factors.eps,
            factors.step_size,
            BLOCK=BLOCK,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _step(
    weights: tl.tensor,
    blocks: tl.tensor,
    theta: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    root_correction: float,
    eps: float,
    step_size: float,
    BLOCK: tl.constexpr,
) -> None:
    block = blocks + 2 * tl.program_id(0).to(tl.int64)
    row = weights + ROW * tl.load(block)
    entry = tl.load(block + 1) + tl.arange(0, BLOCK)
    mask = entry < tl.load(row + 3)
    flat = tl.load(row + 4) + entry

    grad = tl.load(g + flat, mask=mask, other=0.0)
    first = tl.load(m + flat, mask=mask, other=0.0)
    second = tl.load(v + flat, mask=mask, other=0.0)
    value = tl.load(theta + flat, mask=mask, other=0.0) * decay
    first += one_minus_beta1 * (grad - first)
    second = second * beta2 + one_minus_beta2 * grad * grad
    # Rounded as torch rounds: the kernel waits for memory, not for these.
    denominator = tl.div_rn(tl.sqrt_rn(second), root_correction) + eps
    value -= tl.div_rn(step_size * first, denominator)
    tl.store(m + flat, first, mask=mask)
    tl.store(v + flat, second, mask=mask)
    tl.store(theta + flat, value, mask=mask)

    indices = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    rest = tl.load(indices + entry, mask=mask, other=0)
    # Not tl.zeros_like: what the language's own library is written in is out of the interpreter's reach once
    # triton was imported without it.
    place = tl.full((BLOCK,), 0, tl.int64)
    for axis in tl.static_range(2, -1, -1):
        size = tl.load(row + 6 + 2 * axis).to(tl.int32)
        # Every program of a weight goes the same way; contiguous weights are spared the divisions.
        if size > 1:
            place += (rest % size).to(tl.int64) * tl.load(row + 7 + 2 * axis)
            rest = rest // size
    place += rest.to(tl.int64) * tl.load(row + 5)

    address, code = tl.load(row), tl.load(row + 2)
    if code == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + place, value, mask=mask)
    elif code == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + place, value.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + place, value.to(tl.bfloat16), mask=mask)
