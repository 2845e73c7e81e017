"""Operation 4 in Triton, the projected step of all sections in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerprune.ops import projected_step

MOST_RANKED = 2048
"""Sections that one program ranks by comparing all pairs; the specification, which sorts, serves
more."""


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
        # The program that finishes last sees what all have written.
        tl.store(moved + section, target, mask=there)
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.debug_barrier()
            _compete(
                theta, statistics, in_play, penalty, free, moved, sections, confidence,
                max_descending, BLOCK, CHUNK,
            )  # fmt: skip
    else:
        movable = tl.load(free + section, mask=there, other=0) != 0
        tl.store(in_play + section, movable, mask=there)
        tl.store(theta + section, target, mask=there & movable)


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
            theta.new_zeros(1, dtype=torch.int32), sections, slope.shape[1], *numbers,
            COMPETE=max_descending >= 0, TOGETHER=together, BLOCK_ROWS=256,
            BLOCK=max(16, triton.next_power_of_2(sections)), CHUNK=16, num_warps=8,
        )  # fmt: skip
    for tensor, copy in zip(updated, dense, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
