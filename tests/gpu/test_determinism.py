"""Bit-equal results from run to run, whatever else the GPU does."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

REPEATS = 20


def test_repeats(every):
    """The same call over and over, beside work that takes some of the GPU away."""
    v = every.values(3)
    expected = every.run(v)
    other, busy = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            torch.mm(busy, busy)
        assert every.equal(every.run(v), expected)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(every):
    """Nothing refuses them, nor is another result the deterministic one."""
    v = every.values(3)
    torch.use_deterministic_algorithms(False)
    expected = every.run(v)
    torch.use_deterministic_algorithms(True)
    assert every.equal(every.run(v), expected)


def test_training(training):
    """Two trainings from one seed are one: thetas and weights after thirty steps."""
    first, second = training(), training()
    for _ in range(30):
        assert first.step() == second.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
