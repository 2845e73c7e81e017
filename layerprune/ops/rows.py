"""``take_rows``: the gather in front of a branch that runs on some rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerprune.ops.reference import empty_rows, flat_rows, row_format
from layerprune.ops.schema import call_in_place, register


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` in the memory format of ``x``."""
    layout = row_format(x)
    if layout is torch.contiguous_format:
        return x.index_select(0, rows)
    return x.movedim(1, -1).index_select(0, rows).movedim(-1, 1)


def _scatter_add_(out: Tensor, rows: Tensor, source: Tensor) -> None:
    layout = row_format(out)
    if not out.is_contiguous(memory_format=layout):
        raise RuntimeError("layerprune: out must be contiguous or channels_last")
    flat_rows(out, layout).index_add_(0, rows, flat_rows(source, layout))


def _scatter_add(base: Tensor, rows: Tensor, source: Tensor) -> Tensor:
    out = base.clone(memory_format=row_format(base))
    _scatter_add_rows_(out, rows, source)
    return out


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _scatter_add_rows(grad.new_zeros(ctx.shape), ctx.saved_tensors[0], grad), None


def _scatter_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    # A gradient of its own: the one that came in may belong to others.
    return grad.clone(), None, _gather_rows(grad, ctx.saved_tensors[0])


_gather_rows = register(
    "gather_rows(Tensor x, Tensor rows) -> Tensor",
    _gather,
    lambda x, rows: empty_rows(rows.shape[0], x, row_format(x)),
    _gather_backward,
    _save_rows,
)

_scatter_add_rows_ = register(
    "scatter_add_rows_(Tensor(a!) out, Tensor rows, Tensor source) -> ()",
    _scatter_add_,
    lambda out, rows, source: None,
)

_scatter_add_rows = register(
    "scatter_add_rows(Tensor base, Tensor rows, Tensor source) -> Tensor",
    _scatter_add,
    lambda base, rows, source: torch.empty_like(base, memory_format=row_format(base)),
    _scatter_add_backward,
    _save_rows,
)


def _may_overwrite(gradient: Tensor) -> bool:
    """Whether an in-place update of ``gradient`` is seen by nobody but its holder.

    A view may share its memory with another gradient, under ``create_graph`` it is part of a graph,
    and a compiler puts the update in place itself.
    """
    return not (
        torch.compiler.is_compiling() or torch.is_grad_enabled() or gradient._is_view()
    ) and gradient.is_contiguous(memory_format=row_format(gradient))


class TakeRows(torch.autograd.Function):
    """Gives the rows that run and the whole input, as two outputs of one autograd node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
        """See ``layerprune.ops.take_rows``."""
        ctx.save_for_backward(rows)
        ctx.set_materialize_grads(False)
        ctx.exclusive, ctx.shape = exclusive, x.shape
        # The engine makes the second output a new node's tensor on the storage of x.
        return _gather_rows(x, rows), x

    @staticmethod
    def backward(
        ctx: Any, d_rows: Tensor | None, d_rest: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        """Adds the rows' gradient to the shortcut's, in place where that is safe."""
        if d_rows is None:
            return d_rest, None, None
        (rows,) = ctx.saved_tensors
        ours = ctx.exclusive
        if d_rest is None:
            d_rest, ours = d_rows.new_zeros(ctx.shape), True
        if not (ours and _may_overwrite(d_rest)):
            return _scatter_add_rows(d_rest, rows, d_rows), None, None
        call_in_place(_scatter_add_rows_, (d_rest,), d_rest, rows, d_rows)
        return d_rest, None, None
