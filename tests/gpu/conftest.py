"""One call of every operation on a CUDA device, with nothing in it that waits for the device."""

from types import SimpleNamespace

import pytest
import torch

from layerprune import ops

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
