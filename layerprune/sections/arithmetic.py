"""What a section computes under a draw: the gated forwards of whole modules.

Those of branches, which several modules compute, are in `branch_twin`.

Without state of their own, so that a compiler sees all that they depend on in their arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprune import ops
from layerprune.gate import SectionDraw

Activation = str | nn.Module | None


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Applies a section's activation: ``None``, ``"relu"`` or a module."""
    if activation is None:
        return y
    return F.relu(y) if activation == "relu" else activation(y)


def residual_forward(
    draw: SectionDraw | bool,
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor] | None,
    activation: Activation,
) -> Tensor:
    """Computes y = act(shortcut(x) + gate * branch(x)), the branch on the running rows only."""
    if isinstance(draw, bool) or draw.needs_no_gate():
        straight = x if shortcut is None else shortcut(x)
        return activate(straight + branch(x) if draw else straight, activation)
    if draw.runs_whole():
        rows, rest, slot = x, x, None
    else:
        rows, rest = ops.take_rows(x, draw.rows, exclusive=shortcut is None)
        slot = draw.slot
    straight = rest if shortcut is None else shortcut(rest)
    fused = activation if isinstance(activation, str) else None
    y = ops.gated_residual(
        straight, branch(rows), graded(draw), slot, fused, gate_grad_rows=draw.probes
    )
    return y if fused == activation else activate(y, activation)


def opaque_forward(
    draw: SectionDraw | bool,
    x: Tensor,
    whole: Callable[..., Tensor],
    batched: frozenset[int | str],
    shared: frozenset[int | str],
    fills_cache: bool,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    """Computes y = x + gate * (whole(x) - x), the module on the running rows only."""
    if isinstance(draw, bool) or draw.needs_no_gate():
        y = whole(x, *args, **kwargs) if draw or fills_cache else x
        return y if draw else x
    if draw.runs_whole():
        y = whole(x, *args, **kwargs)
        return ops.gated_residual(x, y, graded(draw), form="lerp", gate_grad_rows=draw.probes)
    given = {**dict(enumerate(args, start=1)), **kwargs}
    given = running_rows(given, draw, batched, shared)
    args = [given.pop(position) for position in range(1, len(args) + 1)]
    rows, rest = ops.take_rows(x, draw.rows, exclusive=True)
    y = whole(rows, *args, **given)
    return ops.gated_residual(
        rest, y, graded(draw), draw.slot, form="lerp", gate_grad_rows=draw.probes
    )


def fills_cache(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a module has to run although its gate is closed, for what it keeps.

    A cache of keys and values is asked for its length at its first layer, which must have filled
    it, as long as that layer is there. In training a cache is made for one forward and never asked.
    """
    given = (*args, *kwargs.values())
    return not module.training and any(hasattr(value, "get_seq_length") for value in given)


def running_rows(
    given: dict, draw: SectionDraw, batched: frozenset, shared: frozenset
) -> dict[int | str, object]:
    """The running rows of what a module is called with besides its input.

    Args:
        given: by position or name.
        draw: tells the rows.
        batched: where the tensors are that carry the batch; in a container at (key, place).
        shared: where those are that do not.

    Raises:
        RuntimeError: for a tensor of neither, with as many rows as the batch.
    """
    return {key: _rows_of(value, key, draw, batched, shared) for key, value in given.items()}


def _rows_of(
    value: object, path: object, draw: SectionDraw, batched: frozenset, shared: frozenset
) -> object:
    if isinstance(value, Tensor):
        # What the batch brings may be there in one batch and None in another.
        if path in shared:
            return value
        if path in batched:
            return value[draw.rows]
        if value.dim() > 0 and value.shape[0] == draw.gate.shape[0]:
            raise RuntimeError(
                f"a section is called with a tensor of as many rows as its argument {path!r}, and "
                "had none with example_inputs: give the pruner inputs like those of training"
            )
    elif type(value) in (tuple, list):
        return type(value)(
            _rows_of(each, (path, place), draw, batched, shared) for place, each in enumerate(value)
        )
    elif type(value) is dict:
        return {
            place: _rows_of(each, (path, place), draw, batched, shared)
            for place, each in value.items()
        }
    return value


def graded(draw: SectionDraw) -> Tensor:
    """The gates, without a gradient where no row's is wanted.

    A compiler is not told: it would compile that case apart.
    """
    if torch.compiler.is_compiling() or draw.probes.shape[0]:
        return draw.gate
    return draw.gate.detach()
