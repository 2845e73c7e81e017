"""Operation 1 in Triton, the draw of all sections in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.kernels.philox import RESERVED_ROW, row_words, uniform
from layerprune.ops import draw as specification

MOST_RANKED = 2048
"""Rows that one program ranks by comparing all pairs; the specification, which sorts, serves
more."""

_LEAST_PROBE = tl.constexpr(specification.LEAST_PROBE)
_GREATEST_PROBE = tl.constexpr(specification.GREATEST_PROBE)


@triton.jit
def _random_count(rate, total, word):
    """floor(rate * total + u), at most total: the product is exact in float64."""
    count = tl.floor(rate.to(tl.float64) * total.to(tl.float64) + uniform(word).to(tl.float64))
    return tl.minimum(count.to(tl.int32), total)


@triton.jit
def _rank_rows(
    rng_state, section, first_row, key, flags, batch,
    FLAGGED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many rows come before each of the rows, by (key, row).

    The key is word 1, or where flagged word 0 above 2**32, but word 0 itself for the flagged.
    """
    row = tl.arange(0, BLOCK)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch, CHUNK):
        other = start + tl.arange(0, CHUNK)
        word0, word1, _, _ = row_words(rng_state, section, (first_row + other).to(tl.uint32))
        if FLAGGED:
            flagged = tl.load(flags + other, mask=other < batch, other=0)
            other_key = word0.to(tl.int64) + tl.where(flagged != 0, 0, 1 << 32)
        else:
            other_key = word1.to(tl.int64)
        less = other_key[None, :] < key[:, None]
        tie = (other_key[None, :] == key[:, None]) & (other[None, :] < row[:, None])
        before = (less | tie) & (other < batch)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank


@triton.jit
def _store_members(members, places, count, out, batch, BLOCK: tl.constexpr):
    """Writes the members' rows in ascending order, then -1."""
    row = tl.arange(0, BLOCK)
    inside = row < batch
    place = tl.where(members, places - 1, count + row - places)
    tl.store(out + place, tl.where(members, row, -1).to(tl.int64), mask=inside)


@triton.jit
def _draw_kernel(
    theta, rng_state, probe_rate, gates, slots, rows, probes, counts,
    batch, min_rows, row_multiple,
    SYSTEMATIC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    section = tl.program_id(0).to(tl.int64)
    first_row = tl.load(rng_state + 2)
    keep = tl.load(theta + section)
    rate = tl.load(probe_rate + section)
    row = tl.arange(0, BLOCK)
    inside = row < batch
    word0, word1, word2, word3 = row_words(rng_state, section, (first_row + row).to(tl.uint32))
    position = uniform(word2)
    if SYSTEMATIC:
        whole = (first_row * 0 + RESERVED_ROW).to(tl.uint32)
        reserved0, reserved1, _, _ = row_words(rng_state, section, whole)
        total = (section * 0 + batch).to(tl.int32)
        probe_count = _random_count(rate, total, reserved1)
        open_count = _random_count(keep, total - probe_count, reserved0)
        rank1 = _rank_rows(
            rng_state, section, first_row, word1.to(tl.int64), gates, batch, False, BLOCK, CHUNK
        )
        probe = inside & (rank1 < probe_count)
        position = tl.div_rn(
            rank1.to(tl.float32) + position, tl.maximum(probe_count, 1).to(tl.float32)
        )
        first = probe
        needed = probe_count + open_count
    else:
        probe = inside & (uniform(word1) < rate)
        first = probe | (inside & (uniform(word3) < keep))
        probe_count = tl.sum(probe.to(tl.int32))
        needed = tl.sum(first.to(tl.int32))
    position = tl.minimum(tl.maximum(position, _LEAST_PROBE), _GREATEST_PROBE)

    # Those that come first in any case stand before all words; every lane reads them of all.
    tl.store(gates + section * batch + row, first.to(tl.float32), mask=inside)
    tl.debug_barrier()
    key = word0.to(tl.int64) + tl.where(first, 0, 1 << 32)
    rank = _rank_rows(
        rng_state, section, first_row, key, gates + section * batch, batch, True, BLOCK, CHUNK
    )
    tl.debug_barrier()
    gate = tl.where(probe, position, (rank < needed).to(tl.float32))
    tl.store(gates + section * batch + row, gate, mask=inside)

    padded = tl.maximum(needed, min_rows) + (row_multiple - 1)
    run_count = tl.minimum(padded - padded % row_multiple, batch)
    runs = inside & (rank < run_count)
    places = tl.cumsum(runs.to(tl.int32), 0)
    tl.store(slots + section * batch + row, tl.where(runs, places - 1, -1), mask=inside)
    _store_members(runs, places, run_count, rows + section * batch, batch, BLOCK)
    probe_places = tl.cumsum(probe.to(tl.int32), 0)
    _store_members(probe, probe_places, probe_count, probes + section * batch, batch, BLOCK)
    tl.store(counts + section * 2, run_count.to(tl.int64))
    tl.store(counts + section * 2 + 1, probe_count.to(tl.int64))


def sample_gates(
    theta: Tensor,
    batch_size: int,
    rng_state: Tensor,
    probe_rate: Tensor,
    min_rows: int,
    row_multiple: int,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``sample_gates``."""
    sections = theta.shape[0]
    if batch_size > MOST_RANKED:
        return specification.reference(
            theta, batch_size, rng_state, probe_rate, min_rows, row_multiple, scheme
        )
    shape = (sections, batch_size)
    outputs = (
        theta.new_empty(shape),
        theta.new_empty(shape, dtype=torch.int32),
        theta.new_empty(shape, dtype=torch.int64),
        theta.new_empty(shape, dtype=torch.int64),
        theta.new_empty((sections, 2), dtype=torch.int64),
    )
    if sections:
        block = max(16, triton.next_power_of_2(batch_size))
        _draw_kernel[(sections,)](
            theta.contiguous(), rng_state.contiguous(), probe_rate.contiguous(), *outputs,
            batch_size, min(min_rows, batch_size), max(1, min(row_multiple, batch_size)),
            SYSTEMATIC=scheme == "systematic", BLOCK=block, CHUNK=16,
            num_warps=4 if block <= 512 else 8,
        )  # fmt: skip
    return outputs
