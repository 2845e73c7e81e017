"""What a call costs whose work is small: pytest-benchmark, to compare one commit with another.

pytest benchmarks/test_latency.py --benchmark-autosave --benchmark-compare
"""

import pytest
import torch

from layerprune import ops

pytest.importorskip("pytest_benchmark")
STATE = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(("sections", "batch"), [(15, 128), (54, 256)])
def test_sample_gates(benchmark, sections, batch):
    theta, rate = torch.full((sections,), 0.5), torch.full((sections,), 1 / 16)
    benchmark(ops.sample_gates, theta, batch, STATE, rate, min_rows=2)


@pytest.mark.parametrize("sections", [15, 1000])
def test_projected_step(benchmark, sections):
    state = (torch.full((sections,), 0.5), torch.zeros(5, sections), torch.zeros(sections).bool())
    flags = torch.ones(sections, dtype=torch.bool)
    slope, counted = torch.randn(sections, 128), torch.rand(sections, 128) < 1 / 8
    options = {"horizon": 50, "noise_factor": 4, "decay": 0.98, "confidence": 2}
    penalty = torch.full((sections,), 0.05)

    def step():
        ops.projected_gate_step_(
            *state, slope, counted, penalty, flags, **options, max_descending=4
        )

    benchmark(step)


@pytest.mark.parametrize("shape", [(128, 16, 8, 8), (2, 4)])
def test_section(benchmark, shape):
    """Gather, sum and their backward on half of the rows of a small batch."""
    x, batch = torch.randn(shape, requires_grad=True), shape[0]
    rows = torch.arange(0, batch, 2)
    slot = torch.full((batch,), -1, dtype=torch.int32)
    slot[rows] = torch.arange(len(rows), dtype=torch.int32)
    gate, grad = (slot >= 0).float(), torch.ones(shape)

    def section():
        taken, rest = ops.take_rows(x, rows, exclusive=True)
        y = ops.gated_residual(rest, taken, gate, slot, "relu")
        torch.autograd.grad(y, x, grad)

    benchmark(section)
