"""Philox4x32-10, the counter-based random number generator of every draw.

The generator is that of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011). 32-bit words are held in int64 tensors, the only integer type in which torch
multiplies and shifts on every device; a product of two such words wraps in int64, and its upper
word is still ``(product >> 32) & 0xFFFFFFFF``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from layerprune.ops.backends import native

MASK = 0xFFFFFFFF
RESERVED_ROW = 0xFFFFFFFF
"""Row number of the uniforms that belong to a section as a whole; no batch row may have it."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The multipliers ``[2]``, the key increments ``[rounds, 2]``, and the scalars mask and 32."""
    steps = [[(i * w) & MASK for w in _WEYL] for i in range(_ROUNDS)]
    values = (list(_MULTIPLIERS), steps, MASK, 32)
    multipliers, steps, mask, shift = (
        torch.tensor(v, dtype=torch.int64, device=device) for v in values
    )
    return multipliers, steps, mask, shift


def _rounds(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the ten rounds.

    Args:
        even: Counter words 0 and 2, int64 ``[2, ...]``, each in [0, 2**32).
        odd: Counter words 1 and 3, int64 ``[2, ...]``; broadcast with ``even``.
        key: int64 ``[2]``.

    Returns:
        Output words (0, 2) and (1, 3), int64 ``[2, ...]`` each.
    """
    multipliers, steps, mask, shift = _constants(even.device)
    trailing = (1,) * (max(even.dim(), odd.dim()) - 1)
    multipliers = multipliers.view(2, *trailing)
    for round_key in ((key + steps) & mask).view(_ROUNDS, 2, *trailing).unbind(0):
        product = (even * multipliers).flip(0)
        even = ((product >> shift) ^ odd).bitwise_xor_(round_key).bitwise_and_(mask)
        # The lower words, with the upper ones left above bit 32: the mask on `even` drops them.
        odd = product
    return even, odd & mask


def philox_4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with ten rounds.

    Args:
        counter: int64 ``[..., 4]``, 32-bit words.
        key: int64 ``[2]``, 32-bit words.

    Returns:
        int64 ``[..., 4]``, the random 32-bit words, each in [0, 2**32).
    """
    words = counter.movedim(-1, 0)
    even, odd = _rounds(words[0::2], words[1::2], key)
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


def grid_words(rng_state: Tensor, sections: Tensor, rows: Tensor) -> Tensor:
    """The random words of every (section, row) of one draw.

    The key is the seed (low word, high word), the counter (draw low, draw high, section, row).

    Args:
        rng_state: int64 ``[3]``: seed, draw number, and a third entry that is not read here.
        sections: int64 ``[L]``, section numbers in [0, 2**32).
        rows: int64 ``[N]``, global row numbers in [0, 2**32).

    Returns:
        int64 ``[4, L, N]``: words 0, 1, 2 and 3.
    """
    mask = _constants(rng_state.device)[2]
    low, high = rng_state & mask, (rng_state >> 32) & mask
    key = torch.stack((low[0], high[0]))
    # Kept as [2, L, 1] and [2, 1, N]: the first round does the broadcast.
    even = torch.stack((low[1].expand_as(sections), sections)).unsqueeze(2)
    odd = torch.stack((high[1].expand_as(rows), rows)).unsqueeze(1)
    even, odd = _rounds(even, odd, key)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(word: Tensor) -> Tensor:
    """Float32 uniforms in [0, 1) of 32-bit words: the upper 24 bits, exactly, times 2**-24."""
    return (word >> 8).to(torch.float32).mul_(2.0**-24)


def philox_stream(seed: int, draw: int, section: int, first_row: int, count: int) -> np.ndarray:
    """The random words behind the gates of some rows of a section, without torch.

    A uniform is a word's upper 24 bits times 2**-24; `layerprune.ops.sample_gates` says which word
    decides what. The words that belong to the section as a whole are those of row 0xFFFFFFFF.

    Args:
        seed: Seed of the draws, in [-2**63, 2**63).
        draw: Draw number, in [0, 2**63).
        section: Section number, in [0, 2**32).
        first_row: First global row.
        count: Number of rows; ``first_row + count`` is at most 2**32.

    Returns:
        uint32 ``[count, 4]``: words 0, 1, 2 and 3 of every row.

    Raises:
        ValueError: A number is out of its range.
    """
    bounds = {
        "seed": (seed, -(1 << 63), (1 << 63) - 1),
        "draw": (draw, 0, (1 << 63) - 1),
        "section": (section, 0, MASK),
        "first_row": (first_row, 0, MASK),
        "count": (count, 0, (1 << 32) - first_row),
    }
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
    seed, draw, section, first_row, count = map(int, (seed, draw, section, first_row, count))
    if native is not None:
        return native.philox_stream(seed % (1 << 64), draw, section, first_row, count)
    rows = torch.arange(first_row, first_row + count, device="cpu")
    state = torch.tensor([seed, draw, 0], device="cpu")
    words = grid_words(state, torch.tensor([section], device="cpu"), rows)
    return words[:, 0].T.numpy().astype(np.uint32)
