"""On a CUDA device: one call of every operation, and a small network that is pruned in training."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig, ops
from layerprune.gate import SectionDraw
from layerprune.sections.residual import GATE_ATTRIBUTE

BATCH, SECTIONS, EVIDENCE = 64, 6, 40
SHAPE = (8, 9, 9)
OPTIONS = {
    "horizon": 10.0,
    "noise_factor": 4.0,
    "decay": 0.9,
    "confidence": 1.0,
    "max_descending": 2,
}


def values(seed, device="cuda"):
    """Arguments by name, for any seed of the same shapes: theta 1/2 with 1/8 probes is exact."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    theta, rate = torch.full((SECTIONS,), 0.5), torch.full((SECTIONS,), 0.125)
    state = torch.tensor([seed, 5, 0])
    drawn = ops.sample_gates(theta, BATCH, state, rate)
    running, probed = drawn.counts[0].tolist()
    made = {
        "x": randn(BATCH, *SHAPE),
        "weight": randn(*SHAPE),
        "grad": randn(BATCH, *SHAPE),
        "gate": drawn.gates[0],
        "slot": drawn.slots[0],
        "rows": drawn.rows[0, :running],
        "probes": drawn.probes[0, :probed],
        "theta": theta,
        "rate": rate,
        "state": state,
        "slope": randn(SECTIONS, EVIDENCE),
        "counted": rand(SECTIONS, EVIDENCE) < 0.5,
        "penalty": 0.01 + rand(SECTIONS),
        "free": torch.ones(SECTIONS, dtype=torch.bool),
        "statistics": torch.zeros(5, SECTIONS),
        "in_play": torch.zeros(SECTIONS, dtype=torch.bool),
    }
    return SimpleNamespace(**{name: tensor.to(device) for name, tensor in made.items()})


def learn_(v):
    """One projected step, in place."""
    ops.projected_gate_step_(
        v.theta, v.statistics, v.in_play, v.slope, v.counted, v.penalty, v.free, **OPTIONS
    )


def run(v):
    """Results and gradients of every operation; its arguments stay as they are."""
    x, weight, gate = leaves = [t.detach().requires_grad_() for t in (v.x, v.weight, v.gate)]
    taken, rest = ops.take_rows(x, v.rows, exclusive=True)
    branch = torch.tanh(taken * weight)
    y = ops.gated_residual(rest, branch, gate, v.slot, "relu", gate_grad_rows=v.probes)
    gradients = torch.autograd.grad(y, leaves, v.grad)
    both = [v.x.detach().requires_grad_(), v.grad.detach().requires_grad_()]
    sampled, gates = ops.sampled_gated_residual(*both, v.theta[0], v.state, 3, form="lerp")
    gradients += torch.autograd.grad(sampled, both, v.grad)
    drawn = ops.sample_gates(v.theta, BATCH, v.state, v.rate, min_rows=4, row_multiple=8)
    moved = SimpleNamespace(**vars(v))
    moved.theta, moved.statistics, moved.in_play = (
        t.clone() for t in (v.theta, v.statistics, v.in_play)
    )
    learn_(moved)
    learnt = (moved.theta, moved.statistics, moved.in_play)
    return [t.detach() for t in (y, sampled, gates, *gradients, *drawn, *learnt)]


def equal(found, expected):
    """Every tensor, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="session")
def every():
    """Every operation once: ``values(seed)``, ``run(values)``, ``learn_(values)``, ``equal``."""
    return SimpleNamespace(values=values, run=run, learn_=learn_, equal=equal)


class Training:
    """A small network in training, whose thetas learn from the second step on.

    Everything that a step needs lies on the GPU.

    Args:
        dtype: that of autocast; None: without.
        scaler: a gradient scaler, or None.
    """

    def __init__(self, dtype=None, scaler=None):
        torch.manual_seed(0)
        width, classes = 32, 5
        sections = [
            GatedResidual(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)),
                activation="relu",
            )
            for _ in range(4)
        ]
        self.model = nn.Sequential(*sections, nn.Linear(width, classes)).cuda()
        self.pruner = LayerPruner(
            self.model,
            example_inputs=torch.zeros(2, width, device="cuda"),
            total_steps=400,
            strength=0.02,
            config=PruneConfig(warm_up=0.0, warm_up_limit=0.0, horizon=0.1),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.dtype, self.scaler = dtype, scaler
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(16, 64, width, generator=generator)
        y = (x.sin() @ torch.randn(width, classes, generator=generator)).argmax(-1)
        self.batches = itertools.cycle(list(zip(x.cuda(), y.cuda(), strict=True)))

    def backward(self, spoil=1.0):
        """Forward and backward of one batch; ``spoil`` is a factor of the loss."""
        x, y = next(self.batches)
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
        return [info.theta for info in self.pruner.sections]

    def gates(self):
        """The gates of the last draw that have a gradient."""
        draws = [getattr(self.model[index], GATE_ATTRIBUTE).draw for index in range(4)]
        gates = [draw.gate for draw in draws if isinstance(draw, SectionDraw)]
        return [gate for gate in gates if gate.grad is not None]

    def parameters(self):
        """The weights as they are now."""
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.fixture
def training():
    """Makes a `Training` of its own."""
    return Training


@pytest.fixture
def kernels():
    """Skips the test where eager PyTorch serves CUDA: that waits for the device."""
    if ops.backends()["cuda"].name == "eager":
        pytest.skip("no kernels serve CUDA")


@pytest.fixture
def deterministic(monkeypatch):
    """Within the test torch, cuBLAS and cuDNN compute the same from run to run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
