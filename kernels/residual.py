"""The gated residual sum in Triton, forward and backward: operations 2 and 3.

Out of range, a slot is read as none: see `rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.kernels.philox import row_words, uniform
from layerprune.kernels.rows import (
    CONFIGS,
    COUNTS,
    SEGMENT,
    dense_rows,
    inverse,
    position,
    programs_for,
    rounded,
    row_size,
    wide,
)
from layerprune.ops import masked
from layerprune.ops.masked import mask_bytes, memory_format
from layerprune.ops.reference import accumulation_dtype, empty_rows, row_format

BITS = tl.constexpr(masked.BITS)


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


@triton.jit
def _mask_place(mask, row, offsets, size, BLOCK: tl.constexpr):
    """Where the mask of a block's elements stands, and which of its bytes there are."""
    bytes_per_row = tl.cdiv(size, BITS)
    byte = tl.min(offsets, axis=0) // BITS + tl.arange(0, BLOCK // BITS)
    return mask + row * bytes_per_row + byte, byte < bytes_per_row


@triton.jit
def _store_mask(mask, row, offsets, passes, size, BLOCK: tl.constexpr):
    """Packs a bit for every element of a block; what is beyond the end does not pass."""
    bits = tl.reshape(passes.to(tl.int32), [BLOCK // BITS, BITS])
    packed = tl.sum(bits << tl.arange(0, BITS)[None, :], axis=1)
    place, there = _mask_place(mask, row, offsets, size, BLOCK)
    tl.store(place, packed.to(tl.uint8), mask=there)


@triton.jit
def _load_mask(mask, row, offsets, size, BLOCK: tl.constexpr):
    """Which elements of a block pass."""
    place, there = _mask_place(mask, row, offsets, size, BLOCK)
    packed = tl.load(place, mask=there, other=0).to(tl.int32)
    bits = packed[:, None] >> tl.arange(0, BITS)[None, :]
    return tl.reshape(bits & 1, [BLOCK]) != 0


@triton.autotune(CONFIGS, key=["size_class"])
@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x, x_stride, branch, branch_stride, y, mask, gate, slot, gates_out, theta, rng_state, section,
    size, branch_rows, size_class,
    RELU: tl.constexpr, LERP: tl.constexpr, SAMPLED: tl.constexpr, SLOTTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = position(size, BLOCK)
    weight, place = _gate_and_slot(
        gate, slot, theta, rng_state, section, row, branch_rows, SAMPLED, SLOTTED
    )
    if SAMPLED:
        first = tl.program_id(0) == row * tl.maximum(tl.cdiv(size, BLOCK), 1)
        tl.store(gates_out + row, weight, mask=first)
    runs = (place >= 0) & (weight != 0)
    a = tl.load(x + row * x_stride + offsets, mask=inside)
    b = tl.load(branch + place * branch_stride + offsets, mask=inside & runs, other=0)
    wide_a, wide_b = wide(a), wide(b)
    weight = weight.to(wide_a.dtype)
    if LERP:
        # From the nearer end, as torch.lerp; at 1 also of infinite numbers exactly the branch.
        difference = wide_b - wide_a
        near = (weight < 0.5) & (weight > -0.5)
        mixed = tl.where(near, wide_a, wide_b) + tl.where(near, weight, weight - 1) * difference
        mixed = tl.where(weight == 1, wide_b, mixed)
    else:
        mixed = wide_a + weight * wide_b
    mixed = tl.where(runs, mixed, wide_a)
    if RELU:
        mixed = tl.where(mixed <= 0, 0, mixed)  # what is not a number stays
    result = rounded(mixed, a.dtype)
    tl.store(y + row * size + offsets, result, mask=inside)
    if mask is not None:
        passes = inside & ~(wide(result) <= 0)
        _store_mask(mask, row, offsets, passes, size, BLOCK)


# Not tuned: a block of another size, or another number of warps, would sum in another order.
@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    grad, grad_stride, y, y_stride, mask, factor, factor_stride, factor_row, d_x, d_branch, parts,
    gate, slot, owner, theta, rng_state, section, size, rows, branch_rows, factor_rows,
    RELU: tl.constexpr, LERP: tl.constexpr, SAMPLED: tl.constexpr, SLOTTED: tl.constexpr,
    GRADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offsets, inside = position(size, BLOCK)
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
    passed = wide(g)
    weight = weight.to(passed.dtype)
    if mask is not None:
        passed = tl.where(_load_mask(mask, row, offsets, size, BLOCK), passed, 0)
    elif RELU:
        out = tl.load(y + row * y_stride + offsets, mask=inside, other=0)
        passed = tl.where(wide(out) <= 0, 0, passed)
    if d_x is not None:
        to_x = tl.where(runs, passed * (1 - weight), passed) if LERP else passed
        tl.store(d_x + row * size + offsets, rounded(to_x, g.dtype), mask=inside)
    to_branch = tl.where(runs, passed * weight, 0)
    to_branch = rounded(to_branch, g.dtype)
    tl.store(d_branch + place * size + offsets, to_branch, mask=inside & has)
    if GRADED:
        source = tl.load(factor_row + row) if factor_row is not None else place
        source = tl.where(has & (source < factor_rows), source, -1)
        f = tl.load(factor + source * factor_stride + offsets, mask=inside & (source >= 0), other=0)
        product = tl.where(source >= 0, passed * wide(f), 0)
        tl.store(parts + tl.program_id(0), tl.sum(product))


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    slot: Tensor | None,
    sampled: tuple[Tensor, Tensor, Tensor, int] | None,
    relu: bool,
    lerp: bool,
    mask: Tensor | None = None,
) -> Tensor:
    layout = row_format(x)
    inputs, others = dense_rows(x, layout), dense_rows(branch, layout)
    y = torch.empty_like(x, memory_format=layout)
    size = row_size(x)
    if x.shape[0] == 0:
        return y
    gates_out, theta, rng_state, section = sampled or (None, None, None, 0)
    _forward_kernel[programs_for(x.shape[0], size)](
        inputs, inputs.stride(0), others, others.stride(0), y, mask, gate,
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
    wants_x: bool = True,
    mask: Tensor | None = None,
    layout: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = layout or row_format(grad if y is None else y)
    rows = grad.shape[0]
    incoming = dense_rows(grad, layout)
    output = None if y is None else dense_rows(y, layout)
    d_x = empty_rows(rows if wants_x else 0, grad, layout)
    d_branch = empty_rows(branch_rows, grad, layout)
    size = row_size(grad if rows else d_branch)
    per_row = triton.cdiv(size, SEGMENT)
    parts = factor_row = None
    if factor is not None:
        factor = dense_rows(factor, layout)
        parts = grad.new_empty((rows, per_row), dtype=accumulation_dtype(grad.dtype))
        if gate_grad_rows is not None:
            factor_row = inverse(gate_grad_rows.contiguous(), rows)
    owner = None
    if slot is not None:
        slot = slot.contiguous()
        owner = inverse(slot, branch_rows)
    programs = (rows + (0 if slot is None else branch_rows)) * per_row
    if programs:
        theta, rng_state, section = sampled or (None, None, 0)
        _backward_kernel[(programs,)](
            incoming, incoming.stride(0), output, 0 if output is None else output.stride(0), mask,
            factor, 0 if factor is None else factor.stride(0), factor_row,
            d_x if wants_x else None, d_branch, parts, gate, slot, owner, theta, rng_state, section,
            size, rows, branch_rows, 0 if factor is None else factor.shape[0],
            RELU=y is not None, LERP=lerp, SAMPLED=sampled is not None,
            SLOTTED=slot is not None, GRADED=factor is not None, BLOCK=SEGMENT, num_warps=8,
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
    wants_x: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``gated_residual_backward``."""
    d_x, d_branch, d_gate = _backward(
        grad, y, gate.contiguous(), slot, None, factor, gate_grad_rows, branch_rows, lerp, wants_x
    )
    return d_x, d_branch, torch.zeros_like(gate) if d_gate is None else d_gate


def gated_relu(
    x: Tensor, branch: Tensor, gate: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operator ``gated_relu``."""
    mask = x.new_empty((x.shape[0], mask_bytes(row_size(x))), dtype=torch.uint8)
    return _forward(x, branch, gate.contiguous(), slot, None, True, False, mask), mask


def gated_relu_backward(
    grad: Tensor,
    mask: Tensor,
    channels_last: bool,
    gate: Tensor,
    slot: Tensor | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    branch_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``gated_relu_backward``."""
    layout = memory_format(grad.dim(), channels_last)
    d_x, d_branch, d_gate = _backward(
        grad, None, gate.contiguous(), slot, None, factor, gate_grad_rows, branch_rows, False,
        True, mask.contiguous(), layout,
    )  # fmt: skip
    return d_x, d_branch, torch.zeros_like(gate) if d_gate is None else d_gate


def sampled_gated_residual_backward(
    grad: Tensor,
    y: Tensor | None,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    lerp: bool,
    wants_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """The operator ``sampled_gated_residual_backward``."""
    sampled = (theta, rng_state.contiguous(), section)
    return _backward(grad, y, None, None, sampled, None, None, grad.shape[0], lerp, wants_x)[:2]
