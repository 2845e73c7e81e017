"""The public operations: checked arguments in front of the registered operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerprune.ops import draw
from layerprune.ops import gated_residual as operators
from layerprune.ops.philox import RESERVED_ROW
from layerprune.ops.rows import TakeRows

SCHEMES = ("systematic", "independent")
FORMS = ("add", "lerp")


class GateDraw(NamedTuple):
    """One draw of the gates of L sections over a batch of B rows.

    Attributes:
        gates: float32 ``[L, B]``: 0 or 1, for a probe row a number strictly between.
        slots: int32 ``[L, B]``: the place of a row among those that run, or -1.
        rows: int64 ``[L, B]``: the rows that run, ascending, then -1.
        probes: int64 ``[L, B]``: the probe rows, ascending, then -1.
        counts: int64 ``[L, 2]``: how many rows run, how many are probes.
    """

    gates: Tensor
    slots: Tensor
    rows: Tensor
    probes: Tensor
    counts: Tensor


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)},"
            f" got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} with the others")


def _readable(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_probability(name: str, tensor: Tensor) -> None:
    if tensor.numel() and _readable(tensor):
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low} to {high}")


def _check_rng_state(rng_state: Tensor, batch_size: int, device: torch.device) -> None:
    _check("rng_state", rng_state, torch.int64, (3,))
    _check_device("rng_state", rng_state, device)
    if _readable(rng_state):
        first = rng_state[2].item()
        if not 0 <= first <= RESERVED_ROW - batch_size:
            raise ValueError(
                f"rng_state[2], the batch's first global row, is {first}; the batch's rows must"
                f" lie in [0, {RESERVED_ROW})"
            )


def sample_gates(
    theta: Tensor,
    batch_size: int,
    rng_state: Tensor,
    probe_rate: Tensor,
    *,
    min_rows: int = 1,
    row_multiple: int = 1,
    scheme: str = "systematic",
) -> GateDraw:
    """Draws the gates of all sections for one forward.

    The random words are Philox4x32-10 under the key (seed low, seed high) at the counter (draw
    low, draw high, section, global row). Word 0 ranks the rows for the Bernoulli choice, word 1
    for the choice of probes, word 2 gives a probe's gate, word 3 decides in the ``independent``
    scheme; ranks are by the pair (word, row). A uniform u is a word's upper 24 bits times 2**-24.

    ``systematic``: P = floor(probe_rate * B + u1) rows of least word 1 are probes; their gates
    are (j + u) / P, j = 0, ..., P - 1 in that order, in float32: the sum, then the quotient, then
    a clamp to [2**-25, 1 - 2**-24]. Of the R = B - P others the floor(theta * R + u0) of least
    word 0 have gate 1. u0 and u1 are of words 0 and 1 of the reserved row 0xFFFFFFFF. Every row is
    open with probability theta, as far as 24-bit uniforms resolve it.
    ``independent``: every row is a probe with probability probe_rate, its gate u clamped alike,
    and otherwise open with probability theta, whatever the others are.

    The rows that run are those with an open gate and, in the order of (word 0, row), rows with
    gate 0 until there are at least ``min_rows`` and a multiple of ``row_multiple``, or all.

    Args:
        theta: float32 ``[L]`` in [0, 1], probability of an open gate.
        batch_size: B >= 0.
        rng_state: int64 ``[3]``: seed, draw number, global row of the batch's first row.
        probe_rate: float32 ``[L]`` in [0, 1], share of probe rows.
        min_rows: Least number of rows that run, 0 or more.
        row_multiple: The number of rows that run is a multiple of it, or B; 1 or more.
        scheme: "systematic" or "independent".

    Returns:
        A `GateDraw` on the device of ``theta``. Nothing of it carries a gradient.

    Raises:
        ValueError: An argument has a wrong dtype, shape, device or value. Values in tensors are
            looked at on the CPU only.
    """
    sections = theta.shape[:1]
    _check("theta", theta, torch.float32, tuple(sections))
    _check("probe_rate", probe_rate, torch.float32, tuple(sections))
    _check_device("probe_rate", probe_rate, theta.device)
    if batch_size < 0 or min_rows < 0 or row_multiple < 1:
        raise ValueError(
            "batch_size and min_rows must be at least 0 and row_multiple at least 1,"
            f" got {batch_size}, {min_rows} and {row_multiple}"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    _check_rng_state(rng_state, batch_size, theta.device)
    _check_probability("theta", theta)
    _check_probability("probe_rate", probe_rate)
    return GateDraw(
        *draw.sample_gates(
            theta.detach(),
            batch_size,
            rng_state,
            probe_rate.detach(),
            min_rows,
            row_multiple,
            scheme,
        )
    )


def _check_sum(x: Tensor, branch: Tensor, activation: str | None, form: str) -> None:
    if x.dim() == 0 or x.shape[1:] != branch.shape[1:] or branch.dim() == 0:
        raise ValueError(
            "x [B, *S] and branch [K, *S] must agree in all dimensions but the first,"
            f" got {list(x.shape)} and {list(branch.shape)}"
        )
    if not (x.is_floating_point() and branch.is_floating_point()):
        raise ValueError(
            f"x and branch must be floating point, got {x.dtype} and {branch.dtype}"
        )
    _check_device("branch", branch, x.device)
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

    Backward gives the gradients of x, branch and gate, none of them a view of another tensor. The
    gate's is summed in float32 (float64 for float64). Saved are at most y (for ReLU), gate,
    slot and the rows of the branch (``lerp``: of branch - x) in ``gate_grad_rows``, or the whole
    branch where that is None; nothing of the branch when the gate needs no gradient.

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
        RuntimeError: In a second derivative, which is not provided.
    """
    _check_sum(x, branch, activation, form)
    batch = x.shape[:1]
    _check("gate", gate, torch.float32, tuple(batch))
    _check_device("gate", gate, x.device)
    if slot is None:
        if branch.shape != x.shape:
            raise ValueError(
                f"branch has {branch.shape[0]} rows and x has {batch[0]}: give slot, the row of"
                " the branch for each row of x"
            )
    else:
        _check("slot", slot, torch.int32, tuple(batch))
        _check_device("slot", slot, x.device)
        if branch.shape[0] > batch[0]:
            raise ValueError(f"branch has {branch.shape[0]} rows, more than the {batch[0]} of x")
    if gate_grad_rows is not None:
        _check("gate_grad_rows", gate_grad_rows, torch.int64, tuple(gate_grad_rows.shape[:1]))
        _check_device("gate_grad_rows", gate_grad_rows, x.device)
    x, branch = _promoted(x, branch)
    return operators.gated_residual(
        x, branch, gate, slot, gate_grad_rows, activation == "relu", form == "lerp"
    )


def take_rows(x: Tensor, rows: Tensor, exclusive: bool = False) -> tuple[Tensor, Tensor]:
    """Gathers the rows that run and gives the input on to the shortcut.

    One autograd node has both outputs, so that backward adds the rows' gradient to the shortcut's
    without a tensor of zeros and without a second pass over the shortcut's.

    Args:
        x: ``[B, *S]``.
        rows: int64 ``[K]``, each row at most once.
        exclusive: Promises that ``x_rest`` goes into `gated_residual` and nowhere else. Its
            gradient is then a fresh tensor that nothing else holds, and is added to in place.

    Returns:
        x_rows: ``x[rows]``, ``[K, *S]`` in the memory format of ``x``.
        x_rest: ``x``, for the shortcut.

    Raises:
        ValueError: ``rows`` is not an int64 vector on the device of ``x``.
    """
    _check("rows", rows, torch.int64, tuple(rows.shape[:1]))
    _check_device("rows", rows, x.device)
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
    _check("theta", theta, torch.float32, ())
    _check_device("theta", theta, x.device)
    _check_probability("theta", theta)
    _check_rng_state(rng_state, x.shape[0], x.device)
    if not 0 <= section < 1 << 32:
        raise ValueError(f"section must lie in [0, 2**32), got {section}")
    x, branch = _promoted(x, branch)
    return operators.sampled_gated_residual(
        x, branch, theta, rng_state, section, activation == "relu", form == "lerp"
    )
