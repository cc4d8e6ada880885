"""``lora_indexed`` as two Triton kernels: shrink, ``z = x A[i]^T``, and expand, ``y += z B[i]^T``.

The programs of a sample read its branch from the index on the device and go through that branch's own rank,
not the greatest one. Sums are fp32. Where a layer has few tokens its inputs are split among programs, whose
partial sums expand adds up in one order: no atomics, so the same input gives the same bits.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from studio.kernels.lora_indexed import IndexedStack

# Programs that shrink should have before inputs are split no further, and the least inputs of a part.
ENOUGH_PROGRAMS = 128
LEAST_PART = 512


def tiles(tokens: int, rank: int, *, wide: bool) -> dict[str, int]:
    """Return the tile sizes for so many tokens a sample: at least 16, which is what the dot product takes."""
    return {
        "TOKENS": 16 if tokens <= 16 else 32 if tokens <= 32 else 64,
        "RANKS": min(64, max(16, triton.next_power_of_2(rank))),
        "INPUTS": 32 if wide else 64,
        "OUTPUTS": 32 if wide else 64,
    }


def launch(x: Tensor, y: Tensor, stack: IndexedStack, index: Tensor) -> None:
    """Add each sample's changes to ``y`` ``[B, T, out]``; ``x`` is ``[B, T, in]``, both of any strides."""
    batch, tokens, inputs = x.shape
    rank, outputs = stack.up.shape[1:]
    if not (batch and tokens and rank and outputs):
        return
    sizes = tiles(tokens, rank, wide=x.dtype == torch.float32)
    places = triton.cdiv(tokens, sizes["TOKENS"]) * triton.cdiv(rank, sizes["RANKS"])
    parts = max(1, min(ENOUGH_PROGRAMS // (places * batch), inputs // LEAST_PART))
    part = triton.cdiv(triton.cdiv(inputs, parts), sizes["INPUTS"]) * sizes["INPUTS"]
    parts = max(1, triton.cdiv(inputs, part))
    z = torch.empty((parts, batch, tokens, rank), dtype=torch.float32, device=x.device)
    # The interpreter's products of bf16 are wrong.
    upcast = os.environ.get("TRITON_INTERPRET") == "1" and x.dtype == torch.bfloat16
    common = {"UPCAST": upcast, "TOKENS": sizes["TOKENS"], "RANKS": sizes["RANKS"]}
    with torch.cuda.device_of(x):
        _shrink[(places, batch, parts)](
            x, stack.down, z, index, stack.ranks, tokens, inputs, rank, part,
            *x.stride(), INPUTS=sizes["INPUTS"], **common,
        )  # fmt: skip
        places = triton.cdiv(tokens, sizes["TOKENS"]) * triton.cdiv(outputs, sizes["OUTPUTS"])
        _expand[(places, batch)](
            z, stack.up, y, index, stack.ranks, tokens, outputs, rank, batch, parts,
            *y.stride(), OUTPUTS=sizes["OUTPUTS"], **common,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    x: tl.tensor,
    down: tl.tensor,
    z: tl.tensor,
    index: tl.tensor,
    ranks: tl.tensor,
    tokens: int,
    inputs: int,
    rank: int,
    part: int,
    x_sample: int,
    x_token: int,
    x_input: int,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    branch = tl.load(index + sample)
    # Not tl.cdiv: the interpreter cannot reach what the language's own library is written in.
    rank_tiles = (rank + RANKS - 1) // RANKS
    t = (tl.program_id(0) // rank_tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    first = (tl.program_id(0) % rank_tiles) * RANKS
    r = first + tl.arange(0, RANKS).to(tl.int64)
    own = tl.load(ranks + tl.maximum(branch, 0))
    # What is left out here expand does not read.
    if branch >= 0 and first < own:
        start = tl.program_id(2) * part
        total = tl.full((TOKENS, RANKS), 0.0, tl.float32)
        for offset in range(start, tl.minimum(start + part, inputs), INPUTS):
            k = offset + tl.arange(0, INPUTS).to(tl.int64)
            rows = x + sample * x_sample + t[:, None] * x_token + k[None, :] * x_input
            a = tl.load(rows, mask=(t[:, None] < tokens) & (k[None, :] < inputs), other=0.0)
            columns = down + (branch * rank + r[None, :]) * inputs + k[:, None]
            b = tl.load(columns, mask=(r[None, :] < own) & (k[:, None] < inputs), other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        samples = tl.num_programs(1).to(tl.int64)
        place = ((tl.program_id(2) * samples + sample) * tokens + t[:, None]) * rank + r[None, :]
        tl.store(z + place, total, mask=(t[:, None] < tokens) & (r[None, :] < own))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    z: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    index: tl.tensor,
    ranks: tl.tensor,
    tokens: int,
    outputs: int,
    rank: int,
    batch: int,
    parts: int,
    y_sample: int,
    y_token: int,
    y_output: int,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    branch = tl.load(index + sample)
    output_tiles = (outputs + OUTPUTS - 1) // OUTPUTS
    t = (tl.program_id(0) // output_tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o = (tl.program_id(0) % output_tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    own = tl.load(ranks + tl.maximum(branch, 0))
    if branch >= 0 and own > 0:
        total = tl.full((TOKENS, OUTPUTS), 0.0, tl.float32)
        for first in range(0, own, RANKS):
            r = first + tl.arange(0, RANKS).to(tl.int64)
            inner = tl.full((TOKENS, RANKS), 0.0, tl.float32)
            for number in range(0, parts):
                place = ((number * batch + sample) * tokens + t[:, None]) * rank + r[None, :]
                inner += tl.load(z + place, mask=(t[:, None] < tokens) & (r[None, :] < own), other=0.0)
            columns = up + (branch * rank + r[:, None]) * outputs + o[None, :]
            b = tl.load(columns, mask=(r[:, None] < own) & (o[None, :] < outputs), other=0.0)
            if UPCAST:
                # What the product's operand would be rounded to is kept.
                b = b.to(tl.float32)
            total = tl.dot(inner.to(b.dtype), b, total, input_precision="ieee")
        place = y + sample * y_sample + t[:, None] * y_token + o[None, :] * y_output
        mask = (t[:, None] < tokens) & (o[None, :] < outputs)
        tl.store(place, (tl.load(place, mask=mask, other=0.0).to(tl.float32) + total), mask=mask)
