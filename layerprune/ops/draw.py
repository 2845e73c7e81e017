"""Operation 1, ``sample_gates``: one draw of the gates of all sections over a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from layerprune.ops import philox
from layerprune.ops.schema import register

# The open interval (0, 1) in float32, as far as a probe's gate may go.
LEAST_PROBE = 2.0**-25
GREATEST_PROBE = 1.0 - 2.0**-24


def _rank(keys: Tensor, index: Tensor) -> Tensor:
    """Rank of every row by (key, row number): int64 ``[L, B]`` of ``keys`` ``[L, B]``."""
    order = keys.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, index.expand_as(order))


def _random_count(rate: Tensor, total: Tensor | int, word: Tensor) -> Tensor:
    """``floor(rate * total + u)``, int64 ``[L]``.

    The product of a float32 and a batch size is exact in float64, so a backend that contracts
    it with the addition into one fused instruction gets the same count.
    """
    count = rate.double() * total + philox.uniform(word)
    return count.floor_().long().clamp_(max=total)


def _reference(
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
    word0, word1, word2, word3 = (word[:, :batch_size] for word in words)

    if scheme == "systematic":
        probe_count = _random_count(probe_rate, batch_size, words[1][:, batch_size])
        on_count = _random_count(theta, batch_size - probe_count, words[0][:, batch_size])
        probe_rank = _rank(word1, index)
        probe = probe_rank < probe_count.unsqueeze(1)
        position = probe_rank.float().add_(philox.uniform(word2))
        position.div_(probe_count.float().unsqueeze(1)).clamp_(LEAST_PROBE, GREATEST_PROBE)
        first = probe
        needed = probe_count + on_count
    else:
        probe = philox.uniform(word1) < probe_rate.unsqueeze(1)
        probe_count = probe.sum(1)
        position = philox.uniform(word2).clamp_(min=LEAST_PROBE)
        first = probe | (philox.uniform(word3) < theta.unsqueeze(1))
        needed = first.sum(1)

    # With `first` before all words, the rows with an open gate are the first `needed` in rank and
    # the padding follows in the order of (word 0, row).
    rank = _rank(torch.add(word0, first, alpha=-(1 << 32)), index)
    gates = torch.where(probe, position, (rank < needed.unsqueeze(1)).float())
    padded = needed.clamp(min=min_rows) + (row_multiple - 1)
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


sample_gates = register(
    "sample_gates(Tensor theta, SymInt batch_size, Tensor rng_state, Tensor probe_rate,"
    " int min_rows, int row_multiple, str scheme)"
    " -> (Tensor gates, Tensor slots, Tensor rows, Tensor probes, Tensor counts)",
    _reference,
    _fake,
)


def independent_gates(
    theta: Tensor, batch_size: int, rng_state: Tensor, section: int
) -> Tensor:
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
    word3 = philox.grid_words(rng_state, sections, rows)[3]
    return (philox.uniform(word3[0]) < theta).float()
