"""Philox4x32-10 against published vectors and against plain integers."""

import numpy as np
import pytest
import torch

from layerprune.ops import philox, philox_4x32_10, philox_stream

# Random123's known-answer tests, kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text):
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected, plain):
    """Both the operation and the tests' own plain implementation give the published words."""
    assert torch.equal(philox_4x32_10(_words(counter), _words(key)), _words(expected))
    assert plain.philox(_words(counter).tolist(), _words(key).tolist()) == _words(expected).tolist()


def test_counters_of_any_shape(plain):
    """A batch of counters gives what each gives alone."""
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 1 << 32, (3, 5, 4), generator=generator)
    key = torch.randint(0, 1 << 32, (2,), generator=generator)
    expected = [[plain.philox(c, key.tolist()) for c in row] for row in counter.tolist()]
    assert torch.equal(philox_4x32_10(counter, key), torch.tensor(expected))
    assert philox_4x32_10(counter[:0], key).shape == (0, 5, 4)


@pytest.mark.parametrize("seed", [0, 7, -1, 1 << 40, -(1 << 63)])
@pytest.mark.parametrize("number", [0, 3, (1 << 33) + 5])
def test_grid(seed, number, plain):
    """The grid holds the words of (seed, draw, section, row), whatever the order of sections."""
    sections, rows = torch.tensor([4, 0, 9]), torch.tensor([0, 1, 1000, philox.RESERVED_ROW])
    grid = philox.grid_words(torch.tensor([seed, number, 99]), sections, rows)
    expected = [[plain.words(seed, number, s, r) for r in rows.tolist()] for s in sections.tolist()]
    assert torch.equal(grid, torch.tensor(expected).permute(2, 0, 1))


def test_no_draw_repeats():
    """Draw numbers, sections and rows never share their words: all pairs of words differ.

    Any two of 4 * 50 * 200 independent 63-bit numbers agree with probability below
    40000**2 / 2**64 < 1e-10.
    """
    words = torch.stack(
        [
            philox.grid_words(torch.tensor([1, n, 0]), torch.arange(50), torch.arange(200))
            for n in range(4)
        ]
    )
    pairs = words[:, 0] << 31 ^ words[:, 1]
    assert pairs.unique().numel() == pairs.numel()


def test_uniform_is_exact():
    """The largest word stays below 1, the smallest is 0."""
    words = torch.tensor([0, 255, 256, 0xFFFFFFFF])
    assert philox.uniform(words).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


@pytest.mark.parametrize("seed", [0, 7, -1, (1 << 63) - 1, -(1 << 63)])
@pytest.mark.parametrize("number", [0, (1 << 33) + 5, (1 << 63) - 1])
@pytest.mark.parametrize("section", [0, 3, (1 << 32) - 1])
@pytest.mark.parametrize("first", [0, 1000, (1 << 32) - 5])
def test_stream(seed, number, section, first, plain):
    """Rows of a section as NumPy numbers: the plain generator's words, up to the reserved row."""
    found = philox_stream(seed, number, section, first, 5)
    assert found.dtype == np.uint32 and found.shape == (5, 4)
    assert found.tolist() == [plain.words(seed, number, section, first + i) for i in range(5)]


@pytest.mark.parametrize("count", [0, 1, 7, 1001])
def test_stream_equals_the_grid(count):
    """It is what the draw reads, for any number of rows."""
    found = philox_stream(11, 5, 2, 40, count)
    rows = torch.arange(40, 40 + count)
    grid = philox.grid_words(torch.tensor([11, 5, 0]), torch.tensor([2]), rows)
    assert found.shape == (count, 4) and found.tolist() == grid[:, 0].T.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1 << 63}, "seed must lie in"),
        ({"seed": -(1 << 63) - 1}, "seed must lie in"),
        ({"draw": -1}, r"draw must lie in \[0, .*\], got -1"),
        ({"draw": 1 << 63}, "draw must lie in"),
        ({"section": -1}, "section must lie in"),
        ({"section": 1 << 32}, "section must lie in"),
        ({"first_row": -1}, "first_row must lie in"),
        ({"first_row": 1 << 32}, "first_row must lie in"),
        ({"count": -1}, "count must lie in"),
        ({"first_row": (1 << 32) - 2, "count": 3}, r"count must lie in \[0, 2\], got 3"),
    ],
)
def test_stream_errors(change, message):
    """Each number out of its range is named."""
    arguments = {"seed": 0, "draw": 0, "section": 0, "first_row": 0, "count": 1}
    with pytest.raises(ValueError, match=message):
        philox_stream(**(arguments | change))
