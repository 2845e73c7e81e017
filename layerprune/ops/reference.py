"""Operation 2 in eager PyTorch: the specification of the gated residual sum and what belongs to it.

The functions touch only the rows whose branch runs. They work on rows flattened in memory order, so
that channels_last costs no more than contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_format(tensor: Tensor) -> torch.memory_format:
    """The memory format that results shaped like ``tensor`` take.

    That of ``tensor`` where it is contiguous or channels_last, else contiguous.
    """
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def flat_rows(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``[B, M]``: every row flattened in the order in which ``memory_format`` stores it.

    A view where ``tensor`` has that format, else a copy.
    """
    if memory_format is not torch.contiguous_format:
        tensor = tensor.movedim(1, -1)
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def empty_rows(
    count: int,
    like: Tensor,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``[count, *S]``, uninitialised, for ``like`` of ``[B, *S]``, whose dtype is the default."""
    return torch.empty(
        (count, *like.shape[1:]),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format,
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype; the tensor itself where that is its own."""
    dtype = accumulation_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _running(
    gate: Tensor, slot: Tensor | None, branch_rows: int, wide: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Which rows read the branch, and where.

    Returns:
        rows: int64 ``[N]``, ascending, or None for all of them.
        positions: int ``[N]``, their rows of the branch, or None for 0, 1, ..., K - 1.
        weights: ``wide[N, 1]``, their gates.
    """
    open_gate = gate != 0
    rows = (open_gate if slot is None else open_gate & (slot >= 0)).nonzero().squeeze(1)
    positions = rows if slot is None else slot.index_select(0, rows)
    count = rows.shape[0]
    if count == branch_rows and torch.equal(
        positions, torch.arange(count, dtype=positions.dtype, device=positions.device)
    ):
        positions = None
    if count == gate.shape[0]:
        return None, positions, gate.to(wide).unsqueeze(1)
    return rows, positions, gate.index_select(0, rows).to(wide).unsqueeze(1)


def _select(flat: Tensor, rows: Tensor | None) -> Tensor:
    return flat if rows is None else flat.index_select(0, rows)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, slot: Tensor | None, relu: bool, lerp: bool
) -> Tensor:
    """``y_b = act(x_b + gate_b * branch[slot_b])``, or the linear interpolation with ``lerp``.

    Args:
        x: ``[B, *S]``, floating point.
        branch: ``[K, *S]``, dtype of ``x``.
        gate: float32 ``[B]``.
        slot: int32 ``[B]``, or None for 0, ..., B - 1.
        relu: Whether the activation is ReLU.
        lerp: Interpolate between ``x_b`` and the branch in place of adding.

    Returns:
        ``[B, *S]`` in the memory format of ``x``.
    """
    layout = row_format(x)
    y = torch.empty_like(x, memory_format=layout)
    wide = accumulation_dtype(x.dtype)
    rows, positions, weights = _running(gate, slot, branch.shape[0], wide)
    inputs, outputs = flat_rows(x, layout), flat_rows(y, layout)
    values = _select(flat_rows(branch, layout), positions)
    all_on = bool((weights == 1).all())
    if not lerp and (all_on or wide == x.dtype):
        # A sum of two tensors is rounded once in every dtype.
        if not all_on:
            values = values * weights
        if rows is None:
            torch.add(inputs, values, out=outputs)
        else:
            outputs.copy_(inputs).index_add_(0, rows, values)
    else:
        if not all_on:
            mix = torch.lerp if lerp else torch.addcmul
            mixed = mix(widen(_select(inputs, rows)), widen(values), weights).to(x.dtype)
            # torch.lerp is exact at 1 for finite numbers only.
            values = torch.where(weights == 1, values, mixed) if lerp else mixed
        if rows is None:
            outputs.copy_(values)
        else:
            outputs.copy_(inputs).index_copy_(0, rows, values)
    return y.relu_() if relu else y


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
    """Gradients of ``gated_residual``; all three are fresh tensors.

    Args:
        grad: ``[B, *S]``, gradient of ``y``, any strides.
        y: The forward's result where its activation was ReLU, else None.
        gate: float32 ``[B]``.
        slot: int32 ``[B]`` or None.
        factor: What `gate_factor` gave; with neither ``lerp`` nor ``gate_grad_rows`` the branch
            itself. None if the gate needs no gradient.
        gate_grad_rows: int64 ``[P]`` or None for all rows.
        branch_rows: K.
        lerp: As in the forward.
        wants_x: Whether d_x is wanted; else it has no rows.

    Returns:
        d_x ``[B, *S]`` and d_branch ``[K, *S]`` in the memory format of ``y`` (of ``grad`` without
        it), d_gate float32 ``[B]``.
    """
    layout = row_format(grad if y is None else y)
    d_x = torch.empty_like(grad, memory_format=layout)
    if y is None:
        d_x.copy_(grad)
    else:
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=d_x)
    d_branch = empty_rows(branch_rows, d_x, layout)
    d_sum, outputs = flat_rows(d_x, layout), flat_rows(d_branch, layout)
    d_gate = _gate_gradient(d_sum, gate, slot, factor, gate_grad_rows, layout)

    wide = accumulation_dtype(grad.dtype)
    rows, positions, weights = _running(gate, slot, branch_rows, wide)
    values = _select(d_sum, rows)
    # The products are formed in the accumulation dtype and rounded once on their way out.
    if positions is None:
        torch.mul(values, weights, out=outputs)
    else:
        products = (values * weights).to(grad.dtype)
        outputs.zero_().index_copy_(0, positions.long(), products)
    if lerp:
        torch.mul(values, 1 - weights, out=values)
        if rows is not None:
            d_sum.index_copy_(0, rows, values)
    return d_x if wants_x else empty_rows(0, grad, layout), d_branch, d_gate


def gate_factor(
    x: Tensor, branch: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None, lerp: bool
) -> Tensor:
    """What a gate multiplies: the branch, or with ``lerp`` the branch minus ``x``, widened.

    For ``gate_grad_rows`` only, ``[P, *S]``, or as the branch lies, ``[K, *S]``, where that is
    None. Rows without a slot, and rows of the branch that nobody reads, are 0.
    """
    if gate_grad_rows is not None:
        owner = gate_grad_rows
        positions = owner if slot is None else slot.index_select(0, owner).long()
        absent = positions < 0
    else:
        positions = torch.arange(branch.shape[0], device=x.device)
        owner, absent = positions, torch.zeros_like(positions, dtype=torch.bool)
        if slot is not None:
            # The row of x behind every row of the branch; entry 0 takes those without a slot.
            owners = torch.full((branch.shape[0] + 1,), -1, dtype=torch.int64, device=x.device)
            owners.scatter_(0, slot.long() + 1, torch.arange(x.shape[0], device=x.device))
            owner = owners[1:]
            absent = owner < 0
    result = branch.new_zeros(
        (owner.shape[0], *branch.shape[1:]),
        dtype=accumulation_dtype(x.dtype) if lerp else branch.dtype,
    )
    result = result.contiguous(memory_format=row_format(x if lerp else branch))
    chosen = (~absent).nonzero().squeeze(1)
    values = branch.index_select(0, positions.index_select(0, chosen))
    if lerp:
        values = widen(values) - widen(x.index_select(0, owner.index_select(0, chosen)))
    return result.index_copy_(0, chosen, values)


def _gate_gradient(
    d_sum: Tensor,
    gate: Tensor,
    slot: Tensor | None,
    factor: Tensor | None,
    gate_grad_rows: Tensor | None,
    layout: torch.memory_format,
) -> Tensor:
    """float32 ``[B]``: per row the product of ``d_sum`` and ``factor``, 0 where it is not asked."""
    d_gate = torch.zeros_like(gate)
    if factor is None:
        return d_gate
    factor = widen(flat_rows(factor, layout))
    if gate_grad_rows is None:
        if slot is None:
            return (widen(d_sum) * factor).sum(1).float()
        rows = (slot >= 0).nonzero().squeeze(1)
        positions = slot.index_select(0, rows)
        products = widen(d_sum.index_select(0, rows)) * factor.index_select(0, positions)
        return d_gate.index_copy_(0, rows, products.sum(1).float())
    sums = (widen(d_sum.index_select(0, gate_grad_rows)) * factor).sum(1).float()
    if slot is not None:
        sums = torch.where(slot.index_select(0, gate_grad_rows) >= 0, sums, 0.0)
    return d_gate.index_copy_(0, gate_grad_rows, sums)
