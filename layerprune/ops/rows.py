"""``take_rows``: the gather in front of a branch that runs on some rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerprune.ops.reference import flat_rows, row_format


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` in the memory format of ``x``."""
    layout = row_format(x)
    if layout is torch.contiguous_format:
        return x.index_select(0, rows)
    return x.movedim(1, -1).index_select(0, rows).movedim(-1, 1)


def _may_overwrite(gradient: Tensor) -> bool:
    """Whether an in-place update of ``gradient`` is seen by nobody but its holder.

    A view may share its memory with another gradient, a tensor that requires a gradient is part of
    a graph, and a compiler puts the update in place itself.
    """
    return not (torch.compiler.is_compiling() or gradient.requires_grad or gradient._is_view())


class TakeRows(torch.autograd.Function):
    """Gives the rows that run and the whole input, as two outputs of one autograd node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
        """See ``layerprune.ops.take_rows``."""
        ctx.save_for_backward(rows)
        ctx.set_materialize_grads(False)
        ctx.exclusive, ctx.shape = exclusive, x.shape
        # The engine makes the second output a new node's tensor on the storage of x.
        return _gather(x, rows), x

    @staticmethod
    def backward(
        ctx: Any, d_rows: Tensor | None, d_rest: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        """Adds the rows' gradient to the shortcut's, in place where that is safe."""
        if d_rows is None:
            return d_rest, None, None
        (rows,) = ctx.saved_tensors
        if d_rest is None:
            d_rest = d_rows.new_zeros(ctx.shape)
        layout = row_format(d_rest)
        dense = d_rest.is_contiguous(memory_format=layout)
        if not (dense and ctx.exclusive and _may_overwrite(d_rest)):
            d_rest = d_rest.clone(memory_format=layout)
        flat_rows(d_rest, layout).index_add_(0, rows, flat_rows(d_rows, layout))
        return d_rest, None, None
