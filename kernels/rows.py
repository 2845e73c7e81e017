"""Rows in Triton: what all kernels on them share, and those that gather and scatter them.

A row is `size` elements that lie densely in memory, in the order of its memory format; rows have
any stride. One program works on one segment of one row. Whether an index is in range cannot be
looked at without waiting for the device: rows that are not there are read as absent and not
written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.ops.reference import accumulation_dtype, empty_rows, row_format

SEGMENT = 2048
"""Elements of a row that one program sums: fixed, for sums must not depend on what was tuned."""

COUNTS = ("section", "rows", "branch_rows", "x_rows", "out_rows", "factor_rows")
"""Arguments that change from step to step. A kernel for those divisible by 16, and another for 1,
would be compiled in the middle of a training."""

# A choice of the tuner's is made anew in every process; it must not change a result, and these
# kernels sum nothing. It is made once for sizes of a row between two powers of 2, whatever the
# number of rows.
CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (4096, 8))
]
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
if _INTERPRETED:  # there is nothing to measure
    CONFIGS = CONFIGS[:1]


@triton.jit
def wide(values):
    """In the accumulation type."""
    return values if values.dtype == tl.float64 else values.to(tl.float32)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """To the nearest number of a dtype; Triton's interpreter cuts bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = up.to(tl.uint32).to(tl.float32, bitcast=True)
        values = tl.where(values != values, values, nearest)
    return values.to(dtype)


@triton.jit
def position(size, BLOCK: tl.constexpr):
    """Row and offsets in it of this program, and which of them there are.

    A row without elements has a program too.
    """
    per_row = tl.maximum(tl.cdiv(size, BLOCK), 1)
    unit = tl.program_id(0)  # of 32 bits: a division of 64 costs as much as a part of the row
    offsets = (unit % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (unit // per_row).to(tl.int64), offsets, offsets < size


@triton.autotune(CONFIGS, key=["size_class"])
@triton.jit(do_not_specialize=COUNTS)
def _gather_kernel(x, x_stride, out, rows, size, x_rows, size_class, BLOCK: tl.constexpr):
    row, offsets, inside = position(size, BLOCK)
    source = tl.load(rows + row)
    there = (source >= 0) & (source < x_rows)
    values = tl.load(x + source * x_stride + offsets, mask=inside & there, other=0)
    tl.store(out + row * size + offsets, values, mask=inside)


# Not tuned: every trial would add the rows once more.
@triton.jit(do_not_specialize=COUNTS)
def _scatter_add_kernel(out, rows, source, source_stride, size, out_rows, BLOCK: tl.constexpr):
    row, offsets, inside = position(size, BLOCK)
    target = tl.load(rows + row)
    there = inside & (target >= 0) & (target < out_rows)
    place = out + target * size + offsets
    added = tl.load(source + row * source_stride + offsets, mask=there, other=0)
    held = tl.load(place, mask=there, other=0)
    tl.store(place, rounded(wide(held) + wide(added), held.dtype), mask=there)


@triton.autotune(CONFIGS, key=["size_class"])
@triton.jit(do_not_specialize=COUNTS)
def _factor_kernel(
    x, x_stride, branch, branch_stride, out, x_row, slot, size, x_rows, branch_rows, size_class,
    LERP: tl.constexpr, ASKED: tl.constexpr, SLOTTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = position(size, BLOCK)
    owner = tl.load(x_row + row) if x_row is not None else row
    known = (owner >= 0) & (owner < x_rows)
    place = row
    if ASKED:
        place = owner
        if SLOTTED:
            place = tl.load(slot + owner, mask=known, other=-1).to(tl.int64)
    there = inside & known & (place >= 0) & (place < branch_rows)
    values = tl.load(branch + place * branch_stride + offsets, mask=there, other=0)
    if LERP:
        values = wide(values)
        values -= wide(tl.load(x + owner * x_stride + offsets, mask=there, other=0))
    tl.store(out + row * size + offsets, values, mask=inside)


@triton.jit(do_not_specialize=("count", "size"))
def _inverse_kernel(index, out, count, size, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    for start in range(0, size, BLOCK):
        tl.store(out + start + lanes, -1, mask=start + lanes < size)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        entry = start + lanes
        target = tl.load(index + entry, mask=entry < count, other=-1).to(tl.int64)
        tl.store(out + target, entry, mask=(target >= 0) & (target < size))


def dense_rows(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """The tensor where every row of it is dense in this format, else a copy."""
    row = tensor[:1]
    if row.numel() == 0 or row.is_contiguous(memory_format=layout):
        return tensor
    return tensor.contiguous(memory_format=layout)


def row_size(tensor: Tensor) -> int:
    """Elements of a row, 0 where there is none."""
    return tensor[0].numel() if tensor.shape[0] else 0


def programs_for(rows: int, size: int) -> Callable[[dict], tuple[int]]:
    """The launch grid: a program for every block of every row, at least one."""
    return lambda meta: (rows * max(triton.cdiv(size, meta["BLOCK"]), 1),)


def inverse(index: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: where a number stands in ``index``, or -1."""
    out = torch.empty(size, dtype=torch.int64, device=index.device)
    _inverse_kernel[(1,)](index, out, index.shape[0], size, BLOCK=1024)
    return out


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The operator ``gather_rows``."""
    layout = row_format(x)
    inputs = dense_rows(x, layout)
    out = empty_rows(rows.shape[0], x, layout)
    if out.numel():
        size = row_size(out)
        _gather_kernel[programs_for(rows.shape[0], size)](
            inputs, inputs.stride(0), out, rows.contiguous(), size, x.shape[0], size.bit_length()
        )
    return out


def scatter_add_rows_(out: Tensor, rows: Tensor, source: Tensor) -> None:
    """The operator ``scatter_add_rows_``."""
    layout = row_format(out)
    if not out.is_contiguous(memory_format=layout):
        raise RuntimeError("layerprune: out must be contiguous or channels_last")
    if source.numel() == 0:
        return
    added = dense_rows(source, layout)
    size = row_size(source)
    _scatter_add_kernel[programs_for(rows.shape[0], size)](
        out, rows.contiguous(), added, added.stride(0), size, out.shape[0], BLOCK=SEGMENT
    )


def scatter_add_rows(base: Tensor, rows: Tensor, source: Tensor) -> Tensor:
    """The operator ``scatter_add_rows``."""
    out = base.clone(memory_format=row_format(base))
    scatter_add_rows_(out, rows, source)
    return out


def gate_factor(
    x: Tensor, branch: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None, lerp: bool
) -> Tensor:
    """The operator ``gate_factor``."""
    layout = row_format(x if lerp else branch)
    asked = gate_grad_rows is not None
    count = gate_grad_rows.shape[0] if asked else branch.shape[0]
    out = empty_rows(count, x, layout, accumulation_dtype(x.dtype) if lerp else x.dtype)
    if out.numel() == 0:
        return out
    slot = None if slot is None else slot.contiguous()
    x_row = None
    if asked:
        x_row = gate_grad_rows.contiguous()
    elif slot is not None:
        x_row = inverse(slot, count)
    inputs, others = dense_rows(x, layout), dense_rows(branch, layout)
    size = row_size(out)
    _factor_kernel[programs_for(count, size)](
        inputs, inputs.stride(0), others, others.stride(0), out, x_row, slot, size,
        x.shape[0], branch.shape[0], size.bit_length(),
        LERP=lerp, ASKED=asked, SLOTTED=slot is not None,
    )  # fmt: skip
    return out
