"""Operations on rows in Triton: the gated residual sum, its backward, and what gathers rows.

A row is `size` elements that lie densely in memory, in the order of its memory format; rows have
any stride. One program works on one segment of one row. Whether an index is in range cannot be
looked at without waiting for the device: rows that are not there are read as absent and not
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.kernels.philox import row_words, uniform
from layerprune.ops.reference import accumulation_dtype, empty_rows, row_format

SEGMENT = 2048
"""Elements of a row that one program sums: fixed, for sums must not depend on what was tuned."""

# A choice of the tuner's is made anew in every process; it must not change a result, and these
# kernels sum nothing.
_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (4096, 8))
]
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
if _INTERPRETED:  # there is nothing to measure
    _CONFIGS = _CONFIGS[:1]


@triton.jit
def _wide(values):
    """In the accumulation type."""
    return values if values.dtype == tl.float64 else values.to(tl.float32)


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """To the nearest number of a dtype; Triton's interpreter cuts bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = up.to(tl.uint32).to(tl.float32, bitcast=True)
        values = tl.where(values != values, values, nearest)
    return values.to(dtype)


@triton.jit
def _position(size, BLOCK: tl.constexpr):
    """Row and offsets in it of this program, and which of them there are."""
    per_row = tl.cdiv(size, BLOCK)
    unit = tl.program_id(0).to(tl.int64)
    offsets = (unit % per_row) * BLOCK + tl.arange(0, BLOCK)
    return unit // per_row, offsets, offsets < size


@triton.jit
def _sampled_gate(theta, rng_state, section, row):
    first = tl.load(rng_state + 2)
    _, _, _, word = row_words(rng_state, section, (first + row).to(tl.uint32))
    return (uniform(word) < tl.load(theta)).to(tl.float32)


@triton.jit
def _gate_and_slot(gate, slot, theta, rng_state, section, row, branch_rows,
                   SAMPLED: tl.constexpr, SLOTTED: tl.constexpr):  # fmt: skip
    """A row's gate, its row of the branch or -1."""
    weight = _sampled_gate(theta, rng_state, section, row) if SAMPLED else tl.load(gate + row)
    place = tl.load(slot + row).to(tl.int64) if SLOTTED else row
    return weight, tl.where(place < branch_rows, place, -1)


@triton.autotune(_CONFIGS, key=["size_class"])
@triton.jit
def _forward_kernel(
    x, x_stride, branch, branch_stride, y, gate, slot, gates_out, theta, rng_state, section,
    size, branch_rows, size_class,
    RELU: tl.constexpr, LERP: tl.constexpr, SAMPLED: tl.constexpr, SLOTTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = _position(size, BLOCK)
    weight, place = _gate_and_slot(
        gate, slot, theta, rng_state, section, row, branch_rows, SAMPLED, SLOTTED
    )
    if SAMPLED:
        tl.store(gates_out + row, weight, mask=tl.program_id(0) % tl.cdiv(size, BLOCK) == 0)
    runs = (place >= 0) & (weight != 0)
    a = tl.load(x + row * x_stride + offsets, mask=inside)
    b = tl.load(branch + place * branch_stride + offsets, mask=inside & runs, other=0)
    wide_a, wide_b = _wide(a), _wide(b)
    weight = weight.to(wide_a.dtype)
    if LERP:
        # From the nearer end, as torch.lerp; at 1 also of infinite numbers exactly the branch.
        difference = wide_b - wide_a
        near = (weight < 0.5) & (weight > -0.5)
        mixed = tl.where(near, wide_a + weight * difference, wide_b - difference * (1 - weight))
        mixed = tl.where(weight == 1, wide_b, mixed)
    else:
        mixed = wide_a + weight * wide_b
    mixed = tl.where(runs, mixed, wide_a)
    if RELU:
        mixed = tl.where(mixed <= 0, 0, mixed)  # what is not a number stays
    tl.store(y + row * size + offsets, _rounded(mixed, a.dtype), mask=inside)


@triton.jit
def _backward_kernel(
    grad, grad_stride, y, y_stride, factor, factor_stride, factor_row, d_x, d_branch, parts,
    gate, slot, owner, theta, rng_state, section, size, rows, branch_rows, factor_rows,
    RELU: tl.constexpr, LERP: tl.constexpr, SAMPLED: tl.constexpr, SLOTTED: tl.constexpr,
    GRADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = _position(size, BLOCK)
    if SLOTTED:
        if row >= rows:  # the programs after those of the rows: what nobody reads of the branch
            unread = tl.load(owner + row - rows) < 0
            nothing = tl.zeros([BLOCK], d_branch.dtype.element_ty)
            tl.store(d_branch + (row - rows) * size + offsets, nothing, mask=inside & unread)
            return
    weight, place = _gate_and_slot(
        gate, slot, theta, rng_state, section, row, branch_rows, SAMPLED, SLOTTED
    )
    has = place >= 0
    runs = has & (weight != 0)
    g = tl.load(grad + row * grad_stride + offsets, mask=inside, other=0)
    passed = _wide(g)
    weight = weight.to(passed.dtype)
    if RELU:
        out = tl.load(y + row * y_stride + offsets, mask=inside, other=0)
        passed = tl.where(_wide(out) <= 0, 0, passed)
    to_x = tl.where(runs, passed * (1 - weight), passed) if LERP else passed
    tl.store(d_x + row * size + offsets, _rounded(to_x, g.dtype), mask=inside)
    to_branch = tl.where(runs, passed * weight, 0)
    to_branch = _rounded(to_branch, g.dtype)
    tl.store(d_branch + place * size + offsets, to_branch, mask=inside & has)
    if GRADED:
        source = tl.load(factor_row + row) if factor_row is not None else place
        source = tl.where(has & (source < factor_rows), source, -1)
        f = tl.load(factor + source * factor_stride + offsets, mask=inside & (source >= 0), other=0)
        product = tl.where(source >= 0, passed * _wide(f), 0)
        tl.store(parts + tl.program_id(0), tl.sum(product))


@triton.autotune(_CONFIGS, key=["size_class"])
@triton.jit
def _gather_kernel(x, x_stride, out, rows, size, x_rows, size_class, BLOCK: tl.constexpr):
    row, offsets, inside = _position(size, BLOCK)
    source = tl.load(rows + row)
    there = (source >= 0) & (source < x_rows)
    values = tl.load(x + source * x_stride + offsets, mask=inside & there, other=0)
    tl.store(out + row * size + offsets, values, mask=inside)


@triton.jit
def _scatter_add_kernel(out, rows, source, source_stride, size, out_rows, BLOCK: tl.constexpr):
    row, offsets, inside = _position(size, BLOCK)
    target = tl.load(rows + row)
    there = inside & (target >= 0) & (target < out_rows)
    place = out + target * size + offsets
    added = tl.load(source + row * source_stride + offsets, mask=there, other=0)
    held = tl.load(place, mask=there, other=0)
    tl.store(place, _rounded(_wide(held) + _wide(added), held.dtype), mask=there)


@triton.jit
def _factor_kernel(
    x, x_stride, branch, branch_stride, out, x_row, slot, size, x_rows, branch_rows,
    LERP: tl.constexpr, ASKED: tl.constexpr, SLOTTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = _position(size, BLOCK)
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
        values = _wide(values)
        values -= _wide(tl.load(x + owner * x_stride + offsets, mask=there, other=0))
    tl.store(out + row * size + offsets, values, mask=inside)


@triton.jit
def _inverse_kernel(index, out, count, size, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    for start in range(0, size, BLOCK):
        tl.store(out + start + lanes, -1, mask=start + lanes < size)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        entry = start + lanes
        target = tl.load(index + entry, mask=entry < count, other=-1).to(tl.int64)
        tl.store(out + target, entry, mask=(target >= 0) & (target < size))


def _dense_rows(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """The tensor where every row of it is dense in this format, else a copy."""
    row = tensor[:1]
    if row.numel() == 0 or row.is_contiguous(memory_format=layout):
        return tensor
    return tensor.contiguous(memory_format=layout)


def _row_size(tensor: Tensor) -> int:
    return tensor[0].numel() if tensor.shape[0] else 0


def _programs(rows: int, size: int) -> object:
    return lambda meta: (rows * triton.cdiv(size, meta["BLOCK"]),)


def _inverse(index: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: where a number stands in ``index``, or -1."""
    out = torch.empty(size, dtype=torch.int64, device=index.device)
    _inverse_kernel[(1,)](index, out, index.shape[0], size, BLOCK=1024)
    return out


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    slot: Tensor | None,
    sampled: tuple[Tensor, Tensor, Tensor, int] | None,
    relu: bool,
    lerp: bool,
) -> Tensor:
    layout = row_format(x)
    inputs, others = _dense_rows(x, layout), _dense_rows(branch, layout)
    y = torch.empty_like(x, memory_format=layout)
    size = _row_size(x)
    if y.numel() == 0:
        return y
    gates_out, theta, rng_state, section = sampled or (None, None, None, 0)
    _forward_kernel[_programs(x.shape[0], size)](
        inputs, inputs.stride(0), others, others.stride(0), y, gate,
        None if slot is None else slot.contiguous(), gates_out, theta, rng_state, section,
        size, branch.shape[0], size.bit_length(),
        RELU=relu, LERP=lerp, SAMPLED=sampled is not None, SLOTTED=slot is not None,
    )  # fmt: skip
    return y


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    slot: Tensor | None,
    gate_grad_rows: Tensor | None,
    relu: bool,
    lerp: bool,
) -> Tensor:
    """The operator ``gated_residual``."""
    return _forward(x, branch, gate.contiguous(), slot, None, relu, lerp)


def sampled_gated_residual(
    x: Tensor,
    branch: Tensor,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    relu: bool,
    lerp: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``sampled_gated_residual``."""
    gates = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    sampled = (gates, theta, rng_state.contiguous(), section)
    y = _forward(x, branch, None, None, sampled, relu, lerp)
    return y, gates


def _backward(
    grad: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    slot: Tensor | None,
    sampled: tuple[Tensor, Tensor, int] | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    branch_rows: int,
    lerp: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = row_format(grad if y is None else y)
    rows = grad.shape[0]
    incoming = _dense_rows(grad, layout)
    output = None if y is None else _dense_rows(y, layout)
    d_x = torch.empty_like(grad, memory_format=layout)
    d_branch = empty_rows(branch_rows, grad, layout)
    size = _row_size(grad if rows else d_branch)
    per_row = triton.cdiv(size, SEGMENT)
    parts = factor_row = None
    if factor is not None:
        factor = _dense_rows(factor, layout)
        parts = grad.new_empty((rows, per_row), dtype=accumulation_dtype(grad.dtype))
        if gate_grad_rows is not None:
            factor_row = _inverse(gate_grad_rows.contiguous(), rows)
    owner = None
    if slot is not None:
        slot = slot.contiguous()
        owner = _inverse(slot, branch_rows)
    programs = (rows + (0 if slot is None else branch_rows)) * per_row
    if programs:
        theta, rng_state, section = sampled or (None, None, 0)
        _backward_kernel[(programs,)](
            incoming, incoming.stride(0), output, 0 if output is None else output.stride(0),
            factor, 0 if factor is None else factor.stride(0), factor_row, d_x, d_branch, parts,
            gate, slot, owner, theta, rng_state, section, size, rows, branch_rows,
            0 if factor is None else factor.shape[0],
            RELU=y is not None, LERP=lerp, SAMPLED=sampled is not None, SLOTTED=slot is not None,
            GRADED=factor is not None, BLOCK=SEGMENT, num_warps=8,
        )  # fmt: skip
    return d_x, d_branch, None if parts is None else parts.sum(1).float()


def gated_residual_backward(
    grad: Tensor,
    y: Tensor | None,
    gate: Tensor,
    slot: Tensor | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    branch_rows: int,
    lerp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``gated_residual_backward``."""
    d_x, d_branch, d_gate = _backward(
        grad, y, gate.contiguous(), slot, None, factor, gate_grad_rows, branch_rows, lerp
    )
    return d_x, d_branch, torch.zeros_like(gate) if d_gate is None else d_gate


def sampled_gated_residual_backward(
    grad: Tensor, y: Tensor | None, theta: Tensor, rng_state: Tensor, section: int, lerp: bool
) -> tuple[Tensor, Tensor]:
    """The operator ``sampled_gated_residual_backward``."""
    sampled = (theta, rng_state.contiguous(), section)
    return _backward(grad, y, None, None, sampled, None, None, grad.shape[0], lerp)[:2]


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The operator ``gather_rows``."""
    layout = row_format(x)
    inputs = _dense_rows(x, layout)
    out = empty_rows(rows.shape[0], x, layout)
    if out.numel():
        size = _row_size(out)
        _gather_kernel[_programs(rows.shape[0], size)](
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
    added = _dense_rows(source, layout)
    size = _row_size(source)
    _scatter_add_kernel[_programs(rows.shape[0], size)](
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
        x_row = _inverse(slot, count)
    inputs, others = _dense_rows(x, layout), _dense_rows(branch, layout)
    size = _row_size(out)
    _factor_kernel[_programs(count, size)](
        inputs, inputs.stride(0), others, others.stride(0), out, x_row, slot, size,
        x.shape[0], branch.shape[0],
        LERP=lerp, ASKED=asked, SLOTTED=slot is not None, BLOCK=SEGMENT,
    )  # fmt: skip
    return out
