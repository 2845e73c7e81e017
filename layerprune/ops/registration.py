"""Registration of operations 2 and 3: schemas, fakes and autograd over the eager reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerprune.ops import reference
from layerprune.ops.draw import independent_gates
from layerprune.ops.reference import accumulation_dtype, empty_rows, row_format
from layerprune.ops.rows import TakeRows
from layerprune.ops.schema import register


def _fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    slot: Tensor | None,
    gate_grad_rows: Tensor | None,
    relu: bool,
    lerp: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=row_format(x))


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    slot: Tensor | None,
    gate_grad_rows: Tensor | None,
    relu: bool,
    lerp: bool,
) -> Tensor:
    return reference.gated_residual(x, branch, gate, slot, relu, lerp)


def _gate_factor_fake(
    x: Tensor, branch: Tensor, slot: Tensor | None, gate_grad_rows: Tensor | None, lerp: bool
) -> Tensor:
    count = branch.shape[0] if gate_grad_rows is None else gate_grad_rows.shape[0]
    dtype = accumulation_dtype(x.dtype) if lerp else x.dtype
    return empty_rows(count, x, row_format(x if lerp else branch), dtype)


gate_factor = register(
    "gate_factor(Tensor x, Tensor branch, Tensor? slot, Tensor? gate_grad_rows, bool lerp)"
    " -> Tensor",
    reference.gate_factor,
    _gate_factor_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, gate, slot, rows, relu, lerp = inputs
    factor = None
    if ctx.needs_input_grad[2]:
        whole = rows is None and not lerp
        factor = branch if whole else gate_factor(x, branch, slot, rows, lerp)
    ctx.save_for_backward(output if relu else None, gate, slot, factor, rows)
    ctx.branch_rows, ctx.lerp = branch.shape[0], lerp
    ctx.passes = slot is None and _passes(x, relu, lerp)


def _passes(x: Tensor, relu: bool, lerp: bool) -> bool:
    """Whether the gradient of x is the incoming one, and may be handed on without a copy.

    Not while a compiler traces, which shows no graph beyond x, nor to `TakeRows`, which adds to
    what it gets in place.
    """
    if relu or lerp or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not isinstance(x.grad_fn, TakeRows._backward_cls)


def _for_x(ctx: Any, grad: Tensor, d_x: Tensor) -> Tensor | None:
    """The gradient of x; where it passes the very tensor that came.

    Autograd sees by its count of references that others hold it. A view would look like a tensor of
    its own, and become the ``grad`` of one parameter in the memory of another's.
    """
    if not ctx.needs_input_grad[0]:
        return None
    return grad if ctx.passes else d_x


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, slot, factor, rows = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0] and not ctx.passes
    d_x, d_branch, d_gate = gated_residual_backward(
        grad, y, gate, slot, factor, rows, ctx.branch_rows, ctx.lerp, wants_x
    )
    d_gate = d_gate if factor is not None else None
    return _for_x(ctx, grad, d_x), d_branch, d_gate, None, None, None, None


def _backward_fake(
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
    layout = row_format(grad if y is None else y)
    d_x = empty_rows(grad.shape[0] if wants_x else 0, grad, layout)
    return d_x, empty_rows(branch_rows, grad, layout), torch.empty_like(gate)


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    """The backward of a backward."""
    raise RuntimeError(
        "layerprune: the gated residual sum has no second derivative; differentiate it once,"
        " without create_graph=True"
    )


gated_residual = register(
    "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? slot, Tensor? gate_grad_rows,"
    " bool relu, bool lerp) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
)

gated_residual_backward = register(
    "gated_residual_backward(Tensor grad, Tensor? y, Tensor gate, Tensor? slot, Tensor? factor,"
    " Tensor? gate_grad_rows, SymInt branch_rows, bool lerp, bool wants_x=True)"
    " -> (Tensor, Tensor, Tensor)",
    reference.gated_residual_backward,
    _backward_fake,
    refuse_double_backward,
)


def _sampled_forward(
    x: Tensor,
    branch: Tensor,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    relu: bool,
    lerp: bool,
) -> tuple[Tensor, Tensor]:
    gates = independent_gates(theta, x.shape[0], rng_state, section)
    return reference.gated_residual(x, branch, gates, None, relu, lerp), gates


def _sampled_fake(
    x: Tensor,
    branch: Tensor,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    relu: bool,
    lerp: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=row_format(x))
    return y, theta.new_empty((x.shape[0],))


def _sampled_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, theta, rng_state, ctx.section, relu, ctx.lerp = inputs
    ctx.passes = _passes(x, relu, ctx.lerp)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[0] if relu else None, theta, rng_state)


def _sampled_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wants_x = ctx.needs_input_grad[0] and not ctx.passes
    d_x, d_branch = sampled_gated_residual_backward(
        grad, *ctx.saved_tensors, ctx.section, ctx.lerp, wants_x
    )
    return _for_x(ctx, grad, d_x), d_branch, None, None, None, None, None


def _sampled_backward_reference(
    grad: Tensor,
    y: Tensor | None,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    lerp: bool,
    wants_x: bool = True,
) -> tuple[Tensor, Tensor]:
    rows = grad.shape[0]
    gates = independent_gates(theta, rows, rng_state, section)
    arguments = (grad, y, gates, None, None, None, rows, lerp, wants_x)
    return reference.gated_residual_backward(*arguments)[:2]


def _sampled_backward_fake(
    grad: Tensor,
    y: Tensor | None,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    lerp: bool,
    wants_x: bool = True,
) -> tuple[Tensor, Tensor]:
    layout, rows = row_format(grad if y is None else y), grad.shape[0]
    return empty_rows(rows if wants_x else 0, grad, layout), empty_rows(rows, grad, layout)


sampled_gated_residual = register(
    "sampled_gated_residual(Tensor x, Tensor branch, Tensor theta, Tensor rng_state, int section,"
    " bool relu, bool lerp) -> (Tensor y, Tensor gates)",
    _sampled_forward,
    _sampled_fake,
    _sampled_backward,
    _sampled_setup_context,
)

sampled_gated_residual_backward = register(
    "sampled_gated_residual_backward(Tensor grad, Tensor? y, Tensor theta, Tensor rng_state,"
    " int section, bool lerp, bool wants_x=True) -> (Tensor, Tensor)",
    _sampled_backward_reference,
    _sampled_backward_fake,
    refuse_double_backward,
)
