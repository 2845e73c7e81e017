"""The draw and the projected step of all sections in Triton, one launch each."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.kernels.philox import RESERVED_ROW, row_words, uniform
from layerprune.ops import draw, projected_step

MOST_RANKED = 2048
"""Rows or sections that one program ranks by comparing all pairs; sorting serves more of them."""

_LEAST_PROBE = tl.constexpr(draw.LEAST_PROBE)
_GREATEST_PROBE = tl.constexpr(draw.GREATEST_PROBE)


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
        return draw.reference(
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


@triton.jit
def _statistic(statistics, number: tl.constexpr, sections, section, there):
    # Past the first-level cache: another program has written it in the same launch.
    place = statistics + number * sections + section
    return tl.load(place, mask=there, other=0, cache_modifier=".cg")


@triton.jit
def _row_variance(steps, rows, squares, deviations):
    """Variance of one row's slope about the mean; 0 before the second step."""
    freedom = steps - squares / tl.maximum(rows, 1e-12)
    return tl.where(freedom > 1e-3, deviations / tl.maximum(freedom, 1e-3), 0)


@triton.jit
def _excess(statistics, penalty, free, sections, section, there):
    """The running g + nu, and whether a section should fall."""
    known = _statistic(statistics, 0, sections, section, there) > 0
    excess = _statistic(statistics, 3, sections, section, there)
    excess += tl.load(penalty + section, mask=there, other=0)
    falling = (tl.load(free + section, mask=there, other=0) != 0) & known & (excess > 0)
    return excess, falling


@triton.jit
def _compete(
    theta, statistics, in_play, penalty, free, moved, sections, confidence, max_descending,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Who is in play, and what moves: those in play, and those that should rise beyond doubt."""
    section = tl.arange(0, BLOCK)
    there = section < sections
    excess, falling = _excess(statistics, penalty, free, sections, section, there)
    plays = tl.load(in_play + section, mask=there, other=0) != 0
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, sections, CHUNK):
        other = start + tl.arange(0, CHUNK)
        known = other < sections
        their_excess, rivals = _excess(statistics, penalty, free, sections, other, known)
        theirs = tl.load(in_play + other, mask=known, other=0) != 0
        same = theirs[None, :] == plays[:, None]
        larger = their_excess[None, :] > excess[:, None]
        tie = (their_excess[None, :] == excess[:, None]) & (other[None, :] < section[:, None])
        before = (theirs[None, :] & ~plays[:, None]) | (same & (larger | tie))
        rank += tl.sum((before & rivals[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()  # all have read who was in play
    playing = falling & (rank < max_descending)
    tl.store(in_play + section, playing, mask=there)

    steps = _statistic(statistics, 0, sections, section, there)
    rows = _statistic(statistics, 1, sections, section, there)
    squares = _statistic(statistics, 2, sections, section, there)
    deviations = _statistic(statistics, 4, sections, section, there)
    error = tl.sqrt_rn(_row_variance(steps, rows, squares, deviations) * squares)
    error = tl.where(steps > 1, error / tl.maximum(rows, 1e-12), float("inf"))
    movable = tl.load(free + section, mask=there, other=0) != 0
    allowed = playing | (movable & (excess + confidence * error < 0))
    target = tl.load(moved + section, mask=there, cache_modifier=".cg")
    tl.store(theta + section, target, mask=there & allowed)


@triton.jit
def _step_kernel(
    theta, statistics, in_play, slope, counted, penalty, free, moved, finished,
    sections, count, horizon, noise_factor, decay, confidence, max_descending,
    COMPETE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    section = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    there = section < sections
    total = tl.zeros([TOGETHER], tl.float32)
    number = tl.zeros([TOGETHER], tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        place = section[:, None] * count + row[None, :]
        inside = there[:, None] & (row < count)[None, :]
        evidence = tl.load(counted + place, mask=inside, other=0) != 0
        total += tl.sum(tl.load(slope + place, mask=inside & evidence, other=0), axis=1)
        number += tl.sum(evidence.to(tl.float32), axis=1)

    # West's update of a weighted mean and variance; a section without evidence keeps its own.
    seen = there & (number > 0)
    number = tl.where(seen, number, 1)
    estimate = total / number
    steps = tl.load(statistics + section, mask=there, other=0)
    rows = tl.load(statistics + sections + section, mask=there, other=0)
    squares = tl.load(statistics + 2 * sections + section, mask=there, other=0)
    mean = tl.load(statistics + 3 * sections + section, mask=there, other=0)
    deviations = tl.load(statistics + 4 * sections + section, mask=there, other=0)
    steps = decay * steps + 1
    rows = decay * rows + number
    squares = decay * decay * squares + number
    before = estimate - mean
    mean += before * number / rows
    deviations = decay * deviations + number * before * (estimate - mean)
    tl.store(statistics + section, steps, mask=seen)
    tl.store(statistics + sections + section, rows, mask=seen)
    tl.store(statistics + 2 * sections + section, squares, mask=seen)
    tl.store(statistics + 3 * sections + section, mean, mask=seen)
    tl.store(statistics + 4 * sections + section, deviations, mask=seen)

    # theta - (g + nu) / (nu h), clipped, with h = max(horizon, noise_factor * var(g) / nu^2).
    nu = tl.load(penalty + section, mask=there, other=1)
    variance = _row_variance(steps, rows, squares, deviations) / number
    duration = tl.maximum(noise_factor * variance / (nu * nu), horizon)
    old = tl.load(theta + section, mask=there, other=0)
    target = old - (estimate + nu) / (nu * duration)
    target = tl.where(seen, tl.minimum(tl.maximum(target, 0.0), 1.0), old)
    if COMPETE:
        # The program that finishes last sees what all have written, and leaves the count at 0.
        tl.store(moved + section, target, mask=there)
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.debug_barrier()
            _compete(
                theta, statistics, in_play, penalty, free, moved, sections, confidence,
                max_descending, BLOCK, CHUNK,
            )  # fmt: skip
            tl.store(finished, 0)
    else:
        movable = tl.load(free + section, mask=there, other=0) != 0
        tl.store(in_play + section, movable, mask=there)
        tl.store(theta + section, target, mask=there & movable)


@functools.cache
def _finished(device: torch.device, stream: int) -> Tensor:
    """Counts the programs of a launch that have finished; launches on one stream take turns."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def projected_gate_step_(
    theta: Tensor,
    statistics: Tensor,
    in_play: Tensor,
    slope: Tensor,
    counted: Tensor,
    penalty: Tensor,
    free: Tensor,
    horizon: float,
    noise_factor: float,
    decay: float,
    confidence: float,
    max_descending: int,
) -> None:
    """The operator ``projected_gate_step_``."""
    numbers = (horizon, noise_factor, decay, confidence, max_descending)
    updated = (theta, statistics, in_play)
    sections = theta.shape[0]
    if sections > MOST_RANKED:
        projected_step.reference(*updated, slope, counted, penalty, free, *numbers)
        return
    dense = tuple(tensor.contiguous() for tensor in updated)
    together = 4
    programs = triton.cdiv(sections, together)
    if programs:
        _step_kernel[(programs,)](
            *dense, slope.contiguous(), counted.contiguous(), penalty.contiguous(),
            free.contiguous(), torch.empty_like(dense[0]),
            _finished(theta.device, _stream(theta.device)), sections, slope.shape[1], *numbers,
            COMPETE=max_descending >= 0, TOGETHER=together, BLOCK_ROWS=256,
            BLOCK=max(16, triton.next_power_of_2(sections)), CHUNK=16, num_warps=8,
        )  # fmt: skip
    for tensor, copy in zip(updated, dense, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
