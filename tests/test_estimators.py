"""The estimators of a section's slope, against exact differences of a briefly trained network.

Batch statistics are frozen, so that rows do not meet, but for the last test.
"""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from layerprune import LayerPruner, PruneConfig
from layerprune.difference import measured_difference
from layerprune.gate import SectionDraw
from layerprune.models import resnet

BATCH = 32


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def trained(digits):
    """ResNet-14 (6 sections), 120 steps on digits: about 95 % right."""
    torch.manual_seed(0)
    images, labels = digits
    model = resnet(14, in_channels=1, image_size=8, width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(120):
        rows = torch.randint(0, len(images), (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.8
    return model


def _freeze(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def _pruner(model, digits, **config):
    options = {"warm_up": 0.0, "min_rows": 1} | config
    return LayerPruner(
        model,
        example_inputs=digits[0][:2],
        total_steps=10_000,
        strength=0.05,
        config=PruneConfig(**options),
        seed=7,
    )


@pytest.mark.parametrize("context", [0.0, 0.5, 1.0])
def test_the_integral_of_a_rows_derivative_is_its_difference(trained, digits, context):
    """Quadrature over t, for every section and row, with the other gates at 0, drawn, or at 1.

    The derivative jumps where a ReLU switches: the midpoint rule with n points errs by O(1/n).
    """
    rows, points = 6, 200
    model = _freeze(copy.deepcopy(trained).double().train())
    pruner = _pruner(model, (digits[0].double(), digits[1]))
    gates = pruner._run.bank.gates
    generator = torch.Generator().manual_seed(1)
    for index, gate in enumerate(gates):
        images = digits[0][:rows].double().repeat(points, 1, 1, 1)
        labels = digits[1][:rows].repeat(points)
        everything = torch.arange(rows * points)
        for other in gates:
            value = (torch.rand(rows, generator=generator) < context).float().repeat(points)
            other.draw = SectionDraw(value, everything.int(), everything, everything[:0])
        t = ((torch.arange(points) + 0.5) / points).float().repeat_interleave(rows)
        ends = []
        for end in (torch.ones_like(t), torch.zeros_like(t), t.requires_grad_()):
            gate.draw = SectionDraw(end, everything.int(), everything, everything)
            ends.append(F.cross_entropy(model.forward(images), labels, reduction="none"))
        (derivative,) = torch.autograd.grad(ends[2].sum(), t)
        integral = derivative.double().view(points, rows).mean(0)
        difference = (ends[0] - ends[1]).detach().view(points, rows)[0]
        assert float(difference.abs().max()) > 0.01, index
        scale = float(derivative.abs().max())
        torch.testing.assert_close(integral, difference, atol=0.01 * scale, rtol=0.01)


def _collect(pruner, model, digits, theta, steps):
    """Estimates minus exact differences of their batches, and the latter, ``[steps, sections]``."""
    images, labels = digits
    bank = pruner._run.bank
    bank.theta.fill_(theta)
    bank.probe_rate.fill_(0.15)
    pruner._run.judge.choose = lambda *args, **kwargs: None
    generator = torch.Generator().manual_seed(2)
    errors, exacts = [], []
    for _ in range(steps):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        x, y = images[rows], labels[rows]
        F.cross_entropy(model(x), y).backward()
        slope, counted = bank.collect().evidence(pruner._rows_factor, 1.0)
        estimate = torch.where(counted, slope, 0).sum(1) / counted.sum(1)
        exact = torch.tensor(
            [
                measured_difference(
                    model, gate, lambda x=x, y=y: F.cross_entropy(model.forward(x), y)
                )
                for gate in bank.gates
            ]
        )
        errors.append(estimate - exact)
        exacts.append(exact)
    return torch.stack(errors), torch.stack(exacts)


def _scores(errors):
    return errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_path_is_unbiased_through_the_pruners_draw(trained, digits, theta):
    """Paired with the whole-section difference of the same batch and other gates.

    6 sections, |z| < 4.5 of 60 draws: about 2e-4 false alarms for each theta if z were Student's.
    """
    model = _freeze(copy.deepcopy(trained).train())
    errors, exacts = _collect(_pruner(model, digits), model, digits, theta, 60)
    assert float(_scores(errors).abs().max()) < 4.5
    # It could have been seen: the differences themselves are significant.
    assert float(_scores(exacts).abs().max()) > 4.5


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_taylor_is_biased(trained, digits, theta):
    """The same comparison, the derivative at the drawn gates: most sections are far off."""
    model = _freeze(copy.deepcopy(trained).train())
    pruner = _pruner(model, digits, estimator="taylor")
    errors, exacts = _collect(pruner, model, digits, theta, 40)
    significant = _scores(errors).abs() > 6
    large = errors.mean(0).abs() > 0.2 * exacts.mean(0).abs()
    assert int((significant & large).sum()) >= 4


def test_taylor_sees_nothing_of_a_section_at_its_optimum():
    """C(gate) = (gate a - 1)^2 / 2 at a = 1: Delta is -1/2, the derivative at the open gate 0."""
    gate = torch.linspace(0, 1, 1001, requires_grad=True)
    (derivative,) = torch.autograd.grad((0.5 * (gate - 1) ** 2).sum(), gate)
    assert float(derivative[-1]) == 0
    assert float(derivative.mean()) == pytest.approx(-0.5)


def test_batch_statistics_open_a_gap(trained, digits):
    """With BatchNorm in training mode rows meet: `path` is the local slope, not the difference."""
    model = copy.deepcopy(trained).train()
    errors, exacts = _collect(_pruner(model, digits), model, digits, 1.0, 80)
    scores, gap = _scores(errors), errors.mean(0).abs()
    # Chi-squared with 6 degrees of freedom exceeds 40 once in two million times.
    assert float(scores.square().sum()) > 40
    assert bool((gap > 0.5 * exacts.mean(0).abs())[scores.abs() > 3.5].any())
