"""Equal random words break by the row's number: in padding, in probes' gates, among the others.

Of 300,000 words of 32 bits about ten pairs are equal; the stream is fixed.
"""

import numpy as np
import pytest
import torch

from layerprune import ops
from layerprune.ops.draw import reference

MANY = 300_000
SEED, NUMBER = 20, 3


def same(found, want):
    """Every output, bit for bit."""
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        integers = torch.int32 if a.dtype == torch.float32 else a.dtype
        assert torch.equal(a.view(integers), b.view(integers))


def tied_pairs(words):
    """Where, in the order of (word, row), a row and the next have the same word."""
    order = np.argsort(words, kind="stable")
    ranked = words[order]
    return order, np.flatnonzero(ranked[1:] == ranked[:-1])


def rate_for(count, total, word):
    """A float32 rate at which floor(rate * total + u) is this count."""
    rate = np.float32((count + 0.5 - (word >> 8) * 2.0**-24) / total)
    assert int(np.floor(float(rate) * total + (word >> 8) * 2.0**-24)) == count
    return torch.tensor([rate])


@pytest.fixture(scope="module")
def stream():
    """The words of 300,000 rows of section 0, and those of the section as a whole."""
    reserved = ops.philox_stream(SEED, NUMBER, 0, 0xFFFFFFFF, 1)[0]
    return ops.philox_stream(SEED, NUMBER, 0, 0, MANY), reserved.astype(np.int64)


def draw(theta, rate, **options):
    """Probes and gates of all these rows; those of kernels equal the reference's."""
    state = torch.tensor([SEED, NUMBER, 0])
    found = ops.sample_gates(theta, MANY, state, rate, **options)
    if ops.backends()[theta.device.type].name != "eager":
        padding = (options.get("min_rows", 1), options.get("row_multiple", 1))
        same(found, reference(theta, MANY, state, rate, *padding, "systematic"))
    return found


def test_a_tie_at_the_last_padded_row(stream):
    """Of two rows with one word 0 whose gates are closed, the first one runs."""
    words, reserved = stream
    order, ties = tied_pairs(words[:, 0])
    tie = int(ties[len(ties) // 2])
    few = rate_for(tie // 2, MANY, reserved[0])
    found = draw(few, torch.zeros(1), min_rows=tie + 1)
    assert found.gates.sum() == tie // 2 and found.counts.tolist() == [[tie + 1, 0]]
    assert found.slots[0, order[tie]] >= 0 and found.slots[0, order[tie + 1]] == -1
    assert np.array_equal(found.rows[0, : tie + 1].cpu(), np.sort(order[: tie + 1]))


def test_a_tie_at_the_last_probe(stream):
    """The choice of probes ends between equal words 1; every probe has its own part of (0, 1)."""
    words, reserved = stream
    order, ties = tied_pairs(words[:, 1])
    tie = int(ties[0])
    count = tie + 1
    found = draw(torch.zeros(1), rate_for(count, MANY, reserved[1]))
    assert found.counts[0, 1] == count
    assert np.array_equal(found.probes[0, :count].cpu(), np.sort(order[:count]))
    # The gate of the probe of rank j lies in the j-th of `count` parts of (0, 1).
    uniform = (words[order[:count], 2] >> 8).astype(np.float32) * np.float32(2.0**-24)
    want = (np.arange(count, dtype=np.float32) + uniform) / np.float32(count)
    want = np.clip(want, np.float32(2.0**-25), np.float32(1 - 2.0**-24))
    assert np.array_equal(found.gates[0, order[:count]].cpu(), want)


def test_a_tie_among_those_that_are_no_probes(stream):
    """Probes are out of the choice of open rows; a tie among the others breaks by row."""
    words, reserved = stream
    rate = torch.tensor([0.25])
    by_word1 = np.argsort(words[:, 1], kind="stable")
    probes = int(np.floor(0.25 * MANY + (reserved[1] >> 8) * 2.0**-24))
    others = np.sort(by_word1[probes:])
    order, ties = tied_pairs(words[others, 0])
    assert len(ties) >= 1
    least = int(ties[0]) + 1
    theta = rate_for(least, len(others), reserved[0])
    gates = draw(theta, rate).gates[0].cpu()
    assert np.array_equal(np.flatnonzero(gates == 1), np.sort(others[order[:least]]))
