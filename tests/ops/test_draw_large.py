"""The draw at the sizes of real batches, between backends, and where two rows draw one word."""

import numpy as np
import pytest
import torch

from layerprune import ops
from layerprune.ops.draw import reference

MANY = 300_000
STATE = (5, 0, 0)


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
@pytest.mark.parametrize(
    ("sections", "batch", "options"), [(54, 256, (0, 1)), (7, 1000, (2, 1)), (110, 128, (2, 8))]
)
def test_equals_the_reference(scheme, sections, batch, options, threads):
    """Every output, bit for bit, at any number of threads."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(sections, generator=generator)
    theta[:4] = torch.tensor([0.0, 1.0, 2.0**-24, 1 - 2.0**-24])
    rate = torch.rand(sections, generator=generator) * 0.3 * (torch.arange(sections) % 3 > 0)
    for number in range(3):
        state = torch.tensor([1, number, 17])
        expected = reference(theta, batch, state, rate, *options, scheme)
        for count in (1, 2, 5):
            threads(count)
            drawn = ops.sample_gates(
                theta,
                batch,
                state,
                rate,
                min_rows=options[0],
                row_multiple=options[1],
                scheme=scheme,
            )
            for found, want in zip(drawn, expected, strict=True):
                assert found.dtype == want.dtype and torch.equal(found, want)


@pytest.fixture(scope="module")
def words():
    """The words of many rows of section 0, and those of the section as a whole."""
    rows = ops.philox_stream(STATE[0], STATE[1], 0, 0, MANY)
    return rows, ops.philox_stream(STATE[0], STATE[1], 0, 0xFFFFFFFF, 1)[0]


def boundary(column, word):
    """Two rows with one word, and the rate at which a choice of the least ends between them."""
    order = column.argsort(kind="stable")
    (equal,) = np.flatnonzero(np.diff(column[order].astype(np.int64)) == 0)[:1]
    first, second = order[equal], order[equal + 1]
    uniform = np.float64(np.float32(word >> 8) * np.float32(2.0**-24))
    rate = np.float32((equal + 1.5 - uniform) / len(column))
    assert first < second and np.floor(np.float64(rate) * len(column) + uniform) == equal + 1
    return int(first), int(second), float(rate)


def test_equal_words_rank_by_row_for_open_gates(words):
    """The boundary of the Bernoulli choice falls between two rows with one word 0.

    Among 300,000 words of 32 bits about ten pairs are equal; these are of a fixed seed.
    """
    rows, reserved = words
    first, second, theta = boundary(rows[:, 0], reserved[0])
    drawn = ops.sample_gates(
        torch.tensor([theta]), MANY, torch.tensor(STATE), torch.zeros(1), min_rows=0
    )
    assert drawn.gates[0, first] == 1 and drawn.gates[0, second] == 0
    order = np.lexsort((np.arange(MANY), rows[:, 0]))
    expected = np.sort(order[: int(drawn.counts[0, 0])])
    assert np.array_equal(drawn.rows[0, : len(expected)], expected)
    padded = ops.sample_gates(
        torch.zeros(1),
        MANY,
        torch.tensor(STATE),
        torch.zeros(1),
        min_rows=len(expected),
    )
    assert torch.equal(padded.rows, drawn.rows) and padded.gates.eq(0).all()


def test_equal_words_rank_by_row_for_probes(words):
    """The boundary of the choice of probes falls between two rows with one word 1."""
    rows, reserved = words
    first, second, rate = boundary(rows[:, 1], reserved[1])
    drawn = ops.sample_gates(
        torch.zeros(1), MANY, torch.tensor(STATE), torch.tensor([rate]), min_rows=0
    )
    assert 0 < drawn.gates[0, first] < 1 and drawn.gates[0, second] == 0
    order = np.lexsort((np.arange(MANY), rows[:, 1]))[: int(drawn.counts[0, 1])]
    assert np.array_equal(drawn.probes[0, : len(order)], np.sort(order))
    # Equal words have neighbouring strata, the lower for the lower row.
    gates = drawn.gates[0].numpy()[order]
    assert (np.diff(gates) >= 0).all()


@pytest.mark.parametrize("seed", [0, -1, 1 << 40, -(1 << 63)])
def test_philox_stream(seed, plain):
    """NumPy words, equal to the plain generator's, up to the last row."""
    for draw, section, first in ((0, 0, 0), ((1 << 40) + 3, 0xFFFFFFFF, 0xFFFFFFFF - 4)):
        found = ops.philox_stream(seed, draw, section, first, 5)
        assert found.dtype == np.uint32 and found.shape == (5, 4)
        assert found.tolist() == [plain.words(seed, draw, section, first + row) for row in range(5)]
    assert ops.philox_stream(seed, 0, 0, 0, 0).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1 << 63, 0, 0, 0, 1), "seed"),
        ((0, -1, 0, 0, 1), "draw"),
        ((0, 0, 1 << 32, 0, 1), "section"),
        ((0, 0, 0, -1, 1), "first_row"),
        ((0, 0, 0, (1 << 32) - 1, 2), "count"),
    ],
)
def test_philox_stream_errors(arguments, name):
    """The number out of its range is named."""
    with pytest.raises(ValueError, match=rf"^{name} must lie in"):
        ops.philox_stream(*arguments)
