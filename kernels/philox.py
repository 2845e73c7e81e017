"""Philox4x32-10 in Triton; csrc/gate_math.h and layerprune/ops/philox.py have the same words."""

from __future__ import annotations

import triton
import triton.language as tl

RESERVED_ROW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def row_words(rng_state, section, row):
    """The four random words of a section's rows.

    Args:
        rng_state: pointer to int64: seed, draw number, the batch's first global row.
        section: section number.
        row: global row numbers, uint32 of any shape.

    Returns:
        Four uint32 of the shape of ``row``.
    """
    seed = tl.load(rng_state).to(tl.uint64)
    draw = tl.load(rng_state + 1).to(tl.uint64)
    zero = row ^ row
    c0 = zero + draw.to(tl.uint32)
    c1 = zero + (draw >> 32).to(tl.uint32)
    c2 = zero + tl.cast(section, tl.uint32)  # which is a constant where it is 1
    c3 = row
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = product0.to(tl.uint32)
        key0 = (key0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key1 = (key1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """Float32 in [0, 1): the upper 24 bits, exactly, times 2**-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-8
