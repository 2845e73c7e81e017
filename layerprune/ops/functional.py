"""The public gated residual operations: checked arguments before the registered operators."""

from __future__ import annotations

import torch
from torch import Tensor

from layerprune.ops import masked, registration
from layerprune.ops.backends import backends
from layerprune.ops.checks import (
    check,
    check_device,
    check_probability,
    check_rng_state,
    check_tensor,
    check_vector,
)
from layerprune.ops.rows import TakeRows

FORMS = ("add", "lerp")
MASKED_DEVICES = frozenset({"cuda"} if backends()["cuda"].name != "eager" else ())
"""Where a kernel keeps a bit for every element of a ReLU, see `layerprune.ops.masked`."""


def _check_sum(x: Tensor, branch: Tensor, activation: str | None, form: str) -> None:
    check_tensor("x", x)
    check_tensor("branch", branch)
    if x.dim() == 0 or x.shape[1:] != branch.shape[1:] or branch.dim() == 0:
        raise ValueError(
            "x [B, *S] and branch [K, *S] must agree in all dimensions but the first,"
            f" got {list(x.shape)} and {list(branch.shape)}"
        )
    if not (x.is_floating_point() and branch.is_floating_point()):
        raise ValueError(f"x and branch must be floating point, got {x.dtype} and {branch.dtype}")
    check_device("branch", branch, x.device)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    if activation is not None and form == "lerp":
        raise ValueError(
            "form='lerp' takes no activation: the branch already is the block's whole output"
        )


def _promoted(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == branch.dtype:
        return x, branch
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return x.to(dtype), branch.to(dtype)


def _graded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    slot: Tensor | None = None,
    activation: str | None = None,
    form: str = "add",
    gate_grad_rows: Tensor | None = None,
) -> Tensor:
    """Adds a branch that ran on some rows to its shortcut, weighted by a gate per row.

    ``add``: ``y_b = act(x_b + gate_b * branch[slot_b])``, exactly ``x + branch`` at gate 1.
    ``lerp``: ``y_b = x_b + gate_b * (branch[slot_b] - x_b)``, exactly ``x`` at gate 0 and exactly
    the branch at gate 1 (the two-sided formula of ``torch.lerp``). A row with gate 0 or slot -1
    gets ``act(x_b)``, and its branch is not read. float16 and bfloat16 are computed in float32 and
    rounded once.

    Backward gives the gradients of x, branch and gate, none of them a view of another tensor, but
    where the incoming gradient is that of x as it stands (``add`` without activation and slot, not
    compiled, x not from `take_rows`): there it is handed on, as by PyTorch's own sum. The gate's is
    summed in float32 (float64 for float64). Saved are at most y (for ReLU; on CUDA a bit for every
    element of it), gate, slot and the rows of the branch (``lerp``: of branch - x) in
    ``gate_grad_rows``, or the whole branch where that is None; nothing of the branch when the gate
    needs no gradient.

    Args:
        x: ``[B, *S]``, floating point, any strides; contiguous and channels_last are fast.
        branch: ``[K, *S]``, K <= B. Of another dtype than ``x``, both are promoted.
        gate: float32 ``[B]``.
        slot: int32 ``[B]``: row of ``branch`` for each row of ``x``, each at most once, or -1.
            None: the rows correspond, and K must be B.
        activation: None or "relu"; "relu" only with ``add``.
        form: "add" or "lerp".
        gate_grad_rows: int64 ``[P]``, the rows, each once, whose gate gets a gradient; the others
            get 0. A row with slot -1 gets 0. None: all rows.

    Returns:
        ``[B, *S]`` in the memory format of ``x`` (contiguous for one that is neither contiguous
        nor channels_last).

    Raises:
        ValueError: An argument has a wrong dtype, shape, device or name.
        RuntimeError: In a second derivative, which is not provided. Compiled also where a slot or a
            row is out of range or stands twice.
    """
    _check_sum(x, branch, activation, form)
    batch = x.shape[:1]
    check("gate", gate, torch.float32, batch)
    check_device("gate", gate, x.device)
    if slot is None:
        if branch.shape != x.shape:
            raise ValueError(
                f"branch has {branch.shape[0]} rows and x has {batch[0]}: give slot, the row of"
                " the branch for each row of x"
            )
    else:
        check("slot", slot, torch.int32, batch)
        check_device("slot", slot, x.device)
        if branch.shape[0] > batch[0]:
            raise ValueError(f"branch has {branch.shape[0]} rows, more than the {batch[0]} of x")
    if gate_grad_rows is not None:
        check_vector("gate_grad_rows", gate_grad_rows, torch.int64)
        check_device("gate_grad_rows", gate_grad_rows, x.device)
    x, branch = _promoted(x, branch)
    if activation == "relu" and x.device.type in MASKED_DEVICES and _graded(x, branch, gate):
        return masked.gated_relu(x, branch, gate, slot, gate_grad_rows)[0]
    return registration.gated_residual(
        x, branch, gate, slot, gate_grad_rows, activation == "relu", form == "lerp"
    )


def take_rows(x: Tensor, rows: Tensor, exclusive: bool = False) -> tuple[Tensor, Tensor]:
    """Gathers the rows that run and gives the input on to the shortcut.

    One autograd node has both outputs, so that backward adds the rows' gradient to the shortcut's
    without a tensor of zeros and without a second pass over the shortcut's.

    Args:
        x: ``[B, *S]``.
        rows: int64 ``[K]``, each row at most once.
        exclusive: Promises that ``x_rest`` itself goes into `gated_residual` and nowhere else, and
            that nobody asks for its gradient, be it by a hook. That gradient is then a fresh tensor
            that nothing else holds, and is added to in place.

    Returns:
        x_rows: ``x[rows]``, ``[K, *S]`` in the memory format of ``x``.
        x_rest: ``x``, for the shortcut.

    Raises:
        ValueError: ``x`` has no rows, or ``rows`` is not an int64 vector on its device.
        RuntimeError: Compiled, where a row is out of range or stands twice.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have rows, [B, *S], got a scalar")
    check_vector("rows", rows, torch.int64)
    check_device("rows", rows, x.device)
    return TakeRows.apply(x, rows, exclusive)


def sampled_gated_residual(
    x: Tensor,
    branch: Tensor,
    theta: Tensor,
    rng_state: Tensor,
    section: int,
    activation: str | None = None,
    form: str = "add",
) -> tuple[Tensor, Tensor]:
    """`gated_residual` of a dense branch with gates drawn inside: stochastic depth and its add.

    The gate of row b is 1 with probability theta, from the same stream as the ``independent``
    scheme of `sample_gates` without probes. Backward draws the gates again from ``rng_state``
    and stores no mask; ``rng_state`` must not be changed in place in between, which autograd
    checks.

    Args:
        x: ``[B, *S]``, floating point.
        branch: ``[B, *S]``.
        theta: float32 scalar in [0, 1]; it gets no gradient.
        rng_state: int64 ``[3]``: seed, draw number, global row of the batch's first row.
        section: Section number in [0, 2**32).
        activation: None or "relu"; "relu" only with ``add``.
        form: "add" or "lerp".

    Returns:
        y: ``[B, *S]`` in the memory format of ``x``.
        gates: float32 ``[B]``, not differentiable.

    Raises:
        ValueError: An argument has a wrong dtype, shape, device, name or value.
    """
    _check_sum(x, branch, activation, form)
    if x.shape != branch.shape:
        raise ValueError(
            f"x and branch must have one shape, got {list(x.shape)} and {list(branch.shape)}"
        )
    check("theta", theta, torch.float32, ())
    check_device("theta", theta, x.device)
    check_probability("theta", theta)
    check_rng_state(rng_state, x.shape[0], x.device)
    if not 0 <= section < 1 << 32:
        raise ValueError(f"section must lie in [0, 2**32), got {section}")
    x, branch = _promoted(x, branch)
    return registration.sampled_gated_residual(
        x, branch, theta.detach(), rng_state, section, activation == "relu", form == "lerp"
    )
