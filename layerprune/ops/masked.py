"""The gated residual sum with ReLU that keeps a bit for every element in place of its result.

Backward then reads 1/16 of what it would read of a 16-bit y. Where a kernel has it, autograd uses
this form (`layerprune.ops.functional`); its numbers are those of `gated_residual`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerprune.ops import reference
from layerprune.ops.reference import empty_rows, flat_rows, row_format
from layerprune.ops.registration import gate_factor, refuse_double_backward
from layerprune.ops.schema import register

BITS = 8
"""Elements that a byte of the mask speaks of; the first one is its lowest bit."""


def mask_bytes(elements: int) -> int:
    """Bytes of a row's mask."""
    return (elements + BITS - 1) // BITS


def pack(passed: Tensor) -> Tensor:
    """uint8 ``[B, mask_bytes(M)]`` of bool ``[B, M]``; bits beyond the end are 0."""
    rows, elements = passed.shape
    padded = passed.new_zeros((rows, mask_bytes(elements) * BITS))
    padded[:, :elements] = passed
    weights = 1 << torch.arange(BITS, dtype=torch.uint8, device=passed.device)
    return (padded.view(rows, -1, BITS) * weights).sum(2, dtype=torch.uint8)


def unpack(mask: Tensor, elements: int) -> Tensor:
    """Bool ``[B, M]``, what `pack` packed."""
    bits = mask.unsqueeze(2) >> torch.arange(BITS, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(1)[:, :elements].bool()


def memory_format(dim: int, channels_last: bool) -> torch.memory_format:
    """The format of a tensor of so many dimensions whose channels lie last, or do not."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dim == 4 else torch.channels_last_3d


def _forward(
    x: Tensor, branch: Tensor, gate: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = reference.gated_residual(x, branch, gate, slot, relu=True, lerp=False)
    # As in ReLU's own backward, what is not a number passes.
    return y, pack(~(flat_rows(y, row_format(x)) <= 0))


def _fake(
    x: Tensor, branch: Tensor, gate: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = x.new_empty((x.shape[0], mask_bytes(math.prod(x.shape[1:]))), dtype=torch.uint8)
    return torch.empty_like(x, memory_format=row_format(x)), mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, slot, rows = inputs
    factor = None
    if ctx.needs_input_grad[2]:
        factor = branch if rows is None else gate_factor(x, branch, slot, rows, False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], gate, slot, factor, rows)
    ctx.branch_rows = branch.shape[0]
    ctx.channels_last = row_format(x) is not torch.contiguous_format


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    mask, gate, slot, factor, rows = ctx.saved_tensors
    d_x, d_branch, d_gate = gated_relu_backward(
        grad, mask, ctx.channels_last, gate, slot, factor, rows, ctx.branch_rows
    )
    return d_x, d_branch, d_gate if factor is not None else None, None, None


def _backward_reference(
    grad: Tensor,
    mask: Tensor,
    channels_last: bool,
    gate: Tensor,
    slot: Tensor | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    branch_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = memory_format(grad.dim(), channels_last)
    incoming = flat_rows(grad, layout)
    passed = torch.empty_like(grad, memory_format=layout)
    flat_rows(passed, layout).copy_(torch.where(unpack(mask, incoming.shape[1]), incoming, 0))
    return reference.gated_residual_backward(
        passed, None, gate, slot, factor, gate_grad_rows, branch_rows, lerp=False
    )


def _backward_fake(
    grad: Tensor,
    mask: Tensor,
    channels_last: bool,
    gate: Tensor,
    slot: Tensor | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    branch_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = memory_format(grad.dim(), channels_last)
    d_x = torch.empty_like(grad, memory_format=layout)
    return d_x, empty_rows(branch_rows, grad, layout), torch.empty_like(gate)


gated_relu = register(
    "gated_relu(Tensor x, Tensor branch, Tensor gate, Tensor? slot, Tensor? gate_grad_rows)"
    " -> (Tensor y, Tensor mask)",
    _forward,
    _fake,
    _backward,
    _setup_context,
)

gated_relu_backward = register(
    "gated_relu_backward(Tensor grad, Tensor mask, bool channels_last, Tensor gate, Tensor? slot,"
    " Tensor? factor, Tensor? gate_grad_rows, SymInt branch_rows) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    refuse_double_backward,
)
