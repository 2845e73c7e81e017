"""Automatic mixed precision: float32 gates, unscaled evidence, and steps that are skipped."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig
from layerprune.gates import SectionDraw
from layerprune.sections.residual import GATE_ATTRIBUTE

pytestmark = pytest.mark.gpu

WIDTH, ROWS = 32, 64


class Training:
    """A small network that is pruned as it is trained, from its first step on in learning."""

    def __init__(self, dtype=None, scaler=None):
        torch.manual_seed(0)
        sections = [
            GatedResidual(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
                activation="relu",
            )
            for _ in range(4)
        ]
        self.model = nn.Sequential(*sections, nn.Linear(WIDTH, 5)).cuda()
        self.pruner = LayerPruner(
            self.model,
            example_inputs=torch.zeros(2, WIDTH, device="cuda"),
            total_steps=400,
            strength=0.02,
            config=PruneConfig(warm_up=0.0, warm_up_limit=0.0),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.dtype, self.scaler = dtype, scaler
        self.generator = torch.Generator().manual_seed(0)

    def backward(self, spoil=1.0):
        """Forward and backward of one batch; ``spoil`` is a factor of the loss."""
        x = torch.randn(ROWS, WIDTH, generator=self.generator).cuda()
        y = torch.randint(0, 5, (ROWS,), generator=self.generator).cuda()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", self.dtype, enabled=self.dtype is not None):
            loss = F.cross_entropy(self.model(x), y) * spoil
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()

    def step(self, spoil=1.0):
        """One whole step; theta afterwards."""
        self.backward(spoil)
        if self.scaler is None:
            self.optimizer.step()
            self.pruner.step(self.optimizer)
        else:
            self.scaler.step(self.optimizer)
            self.pruner.step(self.optimizer, self.scaler)
            self.scaler.update()
        return self.theta()

    def theta(self):
        return [info.theta for info in self.pruner.sections]

    def gates(self):
        """The gates of the last draw that have a gradient."""
        draws = [getattr(self.model[index], GATE_ATTRIBUTE).draw for index in range(4)]
        gates = [draw.gate for draw in draws if isinstance(draw, SectionDraw)]
        return [gate for gate in gates if gate.grad is not None]

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_gradients_under_autocast(dtype):
    """float32, and those of the float32 network but for roundings of a branch and its gradient."""
    exact, mixed = Training(), Training(dtype)
    exact.backward()
    mixed.backward()
    assert len(mixed.gates()) == len(exact.gates()) > 0
    for found, expected in zip(mixed.gates(), exact.gates(), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == found.grad.dtype == torch.float32
        # A dozen roundings to 8 bits (bfloat16), relative to the largest value.
        error = (found.grad - expected.grad).abs().max()
        assert error <= 0.1 * expected.grad.abs().max()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_scale_is_taken_out(dtype):
    """Theta under a gradient scaler moves as without one: a power of two rounds nothing."""
    plain = Training(dtype)
    scaled = Training(dtype, torch.amp.GradScaler("cuda", init_scale=2.0**8))
    for _ in range(12):
        expected, found = plain.step(), scaled.step()
        # In float16 the scale saves small gradients that are lost without it.
        assert found == pytest.approx(expected, abs=1e-5 if dtype is None else 0.02)
    assert any(theta != 0.5 for theta in expected)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_skipped_step_moves_nothing(dtype):
    """Nor do the gates' gradients of that step count later; then learning goes on."""
    training = Training(dtype, torch.amp.GradScaler("cuda", init_scale=2.0**8))
    for _ in range(6):
        training.step()
    # What the last good step has found may be learnt in this one.
    held = training.step(spoil=torch.inf)
    parameters = training.parameters()
    for _ in range(3):
        assert training.step(spoil=torch.inf) == held
    assert all(map(torch.equal, training.parameters(), parameters))
    for _ in range(3):
        theta = training.step()
    assert theta != held and not all(map(torch.equal, training.parameters(), parameters))


def test_overflow_without_a_scaler_is_an_error():
    """Nobody would have skipped the step."""
    training = Training(torch.bfloat16)
    with pytest.raises(FloatingPointError, match="not finite"):
        for _ in range(3):
            training.step(spoil=torch.inf)
