"""A gated section of convolutions under ``torch.compile``: at most two compilations."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from layerprune import GatedResidual, ops
from layerprune.gate import SectionDraw
from layerprune.sections.residual import GATE_ATTRIBUTE

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BATCH, CHANNELS, STEPS = 32, 8, 12


def draw(gate, number):
    """Gates for one batch, another share of them open each time; how many rows run."""
    theta = torch.tensor([number / (STEPS - 1)], device="cuda")
    state = torch.tensor([3, number, 0], device="cuda")
    rate = torch.full((1,), 0.125, device="cuda")
    drawn = ops.sample_gates(theta, BATCH, state, rate, min_rows=2)
    running, probed = drawn.counts[0].tolist()
    gate.draw = SectionDraw(
        drawn.gates[0].requires_grad_(),
        drawn.slots[0],
        drawn.rows[0, :running],
        drawn.probes[0, :probed],
    )
    return running


def differentiate(function, module, gate, x):
    """Output and the gradients of input, gates and parameters."""
    x = x.detach().requires_grad_()
    gate.draw.gate.grad = None
    module.zero_grad()
    y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, gate.draw.gate.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-3), (torch.bfloat16, 2**-5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_section_of_convolutions(dtype, tolerance, layout, monkeypatch):
    """Inductor without a break in the graph, whatever the number of rows; values as in eager.

    Relative to the largest value: the compiler adds up in another order, and in bfloat16 leaves out
    roundings between the layers.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = GatedResidual(
        nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        ),
        activation="relu",
    ).to("cuda", memory_format=layout)
    gate = getattr(module, GATE_ATTRIBUTE)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, backend=counter)

    def under(function):
        def call(x):
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                return function(x)

        return call

    generator, counts = torch.Generator().manual_seed(0), set()
    for number in range(STEPS):
        counts.add(draw(gate, number))
        x = torch.randn(BATCH, CHANNELS, 9, 9, generator=generator)
        x = x.to("cuda", memory_format=layout)
        expected = differentiate(under(module), module, gate, x)
        found = differentiate(under(compiled), module, gate, x)
        for tensor, want in zip(found, expected, strict=True):
            assert tensor.dtype == want.dtype and tensor.shape == want.shape
            assert (tensor - want).abs().max() <= tolerance * want.abs().max() + 1e-6
    assert len(counts) > STEPS / 2 and BATCH in counts
    assert counter.frame_count <= 2
