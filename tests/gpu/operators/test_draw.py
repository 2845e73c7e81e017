"""The draw of all sections, bit for bit."""

import pytest
import torch

from layerprune.ops import draw

SCHEMES = ["systematic", "independent"]
BATCHES = [0, 1, 7, 16, 33, 100]


def check(implementation, *arguments):
    """Gates, places, lists and counts."""
    found, expected = implementation("sample_gates", *arguments), draw.reference(*arguments)
    for tensor, want in zip(found, expected, strict=True):
        assert tensor.dtype == want.dtype and tensor.shape == want.shape
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("min_rows", "row_multiple"), [(0, 1), (2, 8), (500, 1000)])
def test_draw(implementation, scheme, min_rows, row_multiple):
    """Certain sections and others, also with a seed and rows beyond 32 bits of a sign."""
    theta = torch.tensor([0.0, 1.0, 0.5, 0.3, 2.0**-24])
    rate = torch.tensor([0.0, 0.0, 1.0, 0.25, 0.5])
    # To Triton 100 rows are what 33 are: several chunks, and a last one that is not full.
    for batch in BATCHES[:-1] if implementation.slow else BATCHES:
        for state in ([1, 0, 0], [-(2**63), 2**40 + 3, 2**32 - 1 - batch]):
            state = torch.tensor(state)
            check(implementation, theta, batch, state, rate, min_rows, row_multiple, scheme)


def test_no_section(implementation):
    none, state = torch.zeros(0), torch.tensor([1, 2, 3])
    drawn = implementation("sample_gates", none, 4, state, none, 1, 1, "systematic")
    assert [tuple(t.shape) for t in drawn] == [(0, 4)] * 4 + [(0, 2)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_rows(implementation, scheme):
    """As many as a block has threads, or as are ranked by comparing, and the first beyond."""
    theta, rate = torch.tensor([0.4, 0.9]), torch.tensor([0.1, 0.9])
    # An interpreter has no threads: 1024 and 1025 are to it what 16 and 33 are above.
    for batch in ([] if implementation.slow else [1024, 1025]) + [2048, 2049, 5000]:
        check(implementation, theta, batch, torch.tensor([1, 2, 3]), rate, 1, 8, scheme)


def test_ties(implementation):
    """Of 300,000 words of 32 bits about ten pairs are equal: the row's number decides."""
    if implementation.slow:
        pytest.skip("the specification draws as many")
    theta, rate = torch.tensor([0.5]), torch.tensor([0.5])
    check(implementation, theta, 300_000, torch.tensor([20, 3, 0]), rate, 0, 7, "systematic")
