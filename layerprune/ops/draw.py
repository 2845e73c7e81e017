"""Operation 1, ``sample_gates``: one draw of the gates of all sections over a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerprune.ops import philox
from layerprune.ops.checks import (
    check,
    check_device,
    check_probability,
    check_rng_state,
    check_vector,
)
from layerprune.ops.schema import register

SCHEMES = ("systematic", "independent")
MOST_ROWS = 1 << 29
"""A batch has fewer rows: its product with a float32 is then exact in float64."""

# The open interval (0, 1) in float32, as far as a probe's gate may go.
LEAST_PROBE = 2.0**-25
GREATEST_PROBE = 1.0 - 2.0**-24


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


def _rank(keys: Tensor, index: Tensor) -> Tensor:
    """Rank of every row by (key, row number): int64 ``[L, B]`` of ``keys`` ``[L, B]``."""
    order = keys.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, index.expand_as(order))


def _random_count(rate: Tensor, total: Tensor | int, uniform: Tensor) -> Tensor:
    """``floor(rate * total + uniform)``, int64 ``[L]``.

    The product of a float32 and a batch size is exact in float64, so a backend that contracts
    it with the addition into one fused instruction gets the same count.
    """
    return (rate.double() * total + uniform).floor_().long().clamp_(max=total)


def reference(
    theta: Tensor,
    batch_size: int,
    rng_state: Tensor,
    probe_rate: Tensor,
    min_rows: int,
    row_multiple: int,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification of ``sample_gates``; see ``layerprune.ops.sample_gates``."""
    device = theta.device
    index = torch.arange(batch_size + 1, device=device)
    global_rows = index + rng_state[2]
    global_rows[batch_size:] = philox.RESERVED_ROW
    index = index[:batch_size]
    sections = torch.arange(theta.shape[0], device=device)
    words = philox.grid_words(rng_state, sections, global_rows)
    uniforms = philox.uniform(words)
    word0, word1 = words[0, :, :batch_size], words[1, :, :batch_size]
    position = uniforms[2, :, :batch_size]

    if scheme == "systematic":
        probe_count = _random_count(probe_rate, batch_size, uniforms[1, :, batch_size])
        on_count = _random_count(theta, batch_size - probe_count, uniforms[0, :, batch_size])
        probe_rank = _rank(word1, index)
        probe = probe_rank < probe_count.unsqueeze(1)
        position = (probe_rank + position).div_(probe_count.unsqueeze(1))
        first = probe
        needed = probe_count + on_count
    else:
        probe = uniforms[1, :, :batch_size] < probe_rate.unsqueeze(1)
        probe_count = probe.sum(1)
        first = probe | (uniforms[3, :, :batch_size] < theta.unsqueeze(1))
        needed = first.sum(1)
    position = position.clamp(LEAST_PROBE, GREATEST_PROBE)

    # With `first` before all words, the rows with an open gate are the first `needed` in rank and
    # the padding follows in the order of (word 0, row).
    rank = _rank(torch.add(word0, first, alpha=-(1 << 32)), index)
    gates = torch.where(probe, position, (rank < needed.unsqueeze(1)).float())
    # More than the batch is the batch; so much more would overflow.
    row_multiple = max(1, min(row_multiple, batch_size))
    padded = needed.clamp(min=min(min_rows, batch_size)) + (row_multiple - 1)
    run_count = (padded - padded % row_multiple).clamp_(max=batch_size)

    # Entry 0 of a list takes the rows that are not members and is dropped.
    members = torch.stack((rank < run_count.unsqueeze(1), probe))
    places = members.cumsum(2) * members
    lists = torch.full((2, theta.shape[0], batch_size + 1), -1, device=device)
    lists.scatter_(2, places, index.expand_as(places))
    return (
        gates,
        places[0].sub(1).int(),
        lists[0, :, 1:].contiguous(),
        lists[1, :, 1:].contiguous(),
        torch.stack((run_count, probe_count), dim=1),
    )


def _fake(
    theta: Tensor,
    batch_size: int,
    rng_state: Tensor,
    probe_rate: Tensor,
    min_rows: int,
    row_multiple: int,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (theta.shape[0], batch_size)
    return (
        theta.new_empty(shape),
        theta.new_empty(shape, dtype=torch.int32),
        theta.new_empty(shape, dtype=torch.int64),
        theta.new_empty(shape, dtype=torch.int64),
        theta.new_empty((theta.shape[0], 2), dtype=torch.int64),
    )


_sample_gates = register(
    "sample_gates(Tensor theta, SymInt batch_size, Tensor rng_state, Tensor probe_rate,"
    " int min_rows, int row_multiple, str scheme)"
    " -> (Tensor gates, Tensor slots, Tensor rows, Tensor probes, Tensor counts)",
    reference,
    _fake,
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
        batch_size: B in [0, 2**29).
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
    check_vector("theta", theta, torch.float32)
    check("probe_rate", probe_rate, torch.float32, theta.shape)
    check_device("probe_rate", probe_rate, theta.device)
    if not 0 <= batch_size < MOST_ROWS or min_rows < 0 or row_multiple < 1:
        raise ValueError(
            f"batch_size must lie in [0, {MOST_ROWS}), min_rows be at least 0 and row_multiple at"
            f" least 1, got {batch_size}, {min_rows} and {row_multiple}"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    check_rng_state(rng_state, batch_size, theta.device)
    check_probability("theta", theta)
    check_probability("probe_rate", probe_rate)
    return GateDraw(
        *_sample_gates(
            theta.detach(),
            batch_size,
            rng_state,
            probe_rate.detach(),
            min_rows,
            row_multiple,
            scheme,
        )
    )


def independent_gates(theta: Tensor, batch_size: int, rng_state: Tensor, section: int) -> Tensor:
    """Gates of one section under the ``independent`` scheme without probes.

    Args:
        theta: float32 scalar.
        batch_size: B.
        rng_state: int64 ``[3]``: seed, draw number, the batch's first global row.
        section: Section number.

    Returns:
        float32 ``[B]`` of zeros and ones.
    """
    rows = torch.arange(batch_size, device=theta.device) + rng_state[2]
    sections = torch.full((1,), section, device=theta.device)
    words = philox.grid_words(rng_state, sections, rows)
    return (philox.uniform(words[3, 0]) < theta).float()
