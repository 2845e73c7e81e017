"""A pruning run on the GPU decides what the same run on the CPU decides."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner
from layerprune.gate import SectionDraw
from layerprune.sections.residual import GATE_ATTRIBUTE

pytestmark = pytest.mark.gpu

WIDTH, FEATURES, CLASSES, ROWS, STEPS = 16, 12, 4, 64, 400


def network():
    """Sections of which not all are needed, in float64: the devices differ by 1e-15."""
    torch.manual_seed(0)
    sections = [
        GatedResidual(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
            ),
            activation="relu",
        )
        for _ in range(5)
    ]
    layers = [nn.Linear(FEATURES, WIDTH), *sections, nn.Linear(WIDTH, CLASSES)]
    return nn.Sequential(*layers).double()


def batch(step):
    """Rows of a class by the signs of products: no linear rule finds it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    y = 2 * (x[:, 0] * x[:, 1] > 0) + (x[:, 2] * x[:, 3] > 0)
    return x, y.long()


def draws(sections):
    """What every section was given for the batch: rows that run, gates and probes, on the host."""
    found = {}
    for name, module in sections.items():
        draw = getattr(module, GATE_ATTRIBUTE).draw
        if isinstance(draw, SectionDraw):
            draw = tuple(t.detach().cpu().tolist() for t in (draw.gate, draw.rows, draw.probes))
        found[name] = draw
    return found


def train(device):
    """A whole run: its events, its draws and thetas of every step, and what is left in the end."""
    model = network().to(device)
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, FEATURES, dtype=torch.float64, device=device),
        total_steps=STEPS,
        strength=0.02,
    )
    sections = {
        name: module for name, module in model.named_modules() if isinstance(module, GatedResidual)
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    drawn, thetas = [], []
    for step in range(STEPS):
        x, y = (t.to(device) for t in batch(step))
        loss = F.cross_entropy(model(x), y)
        drawn.append(draws(sections))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        thetas.append([info.theta for info in pruner.sections])
    return pruner.events, drawn, thetas, pruner.structure(), model.state_dict()


@pytest.mark.usefixtures("deterministic")
def test_equals_the_run_on_the_cpu():
    """The same events, the same draws in every step; thetas but for a rounding in float32.

    Draws and decisions compare numbers that differ in the last digits; none is so near to its
    bound, for this seed and by far.
    """
    expected, found = train("cpu"), train("cuda")
    decisions = {event.decision for event in expected[0]}
    assert "eliminated" in decisions and len(decisions) > 1
    assert [(e.step, e.section, e.decision) for e in found[0]] == [
        (e.step, e.section, e.decision) for e in expected[0]
    ]
    for event, want in zip(found[0], expected[0], strict=True):
        assert event.difference == pytest.approx(want.difference, rel=1e-4, abs=1e-6)
    for step, (here, there) in enumerate(zip(found[1], expected[1], strict=True)):
        assert here == there, f"step {step}"
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(expected[2]), rtol=0, atol=1e-4)
    assert [s["status"] for s in found[3]["sections"]] == [
        s["status"] for s in expected[3]["sections"]
    ]
    assert found[4].keys() == expected[4].keys()
    for name, want in expected[4].items():
        torch.testing.assert_close(found[4][name].cpu(), want, rtol=1e-4, atol=1e-6)
