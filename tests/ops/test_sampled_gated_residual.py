"""Stochastic depth in one operation: the stream, the values and the redraw in backward."""

import pytest
import torch

from layerprune import ops

STATE = torch.tensor([3, 8, 100])
KINDS = [("add", None), ("add", "relu"), ("lerp", None)]


def _inputs(batch=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, branch = (
        torch.randn(batch, 3, 4, 2, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return x.requires_grad_(), branch.requires_grad_()


@pytest.mark.parametrize("section", [0, 3])
def test_gates_are_those_of_the_independent_scheme(section):
    """The same stream as `sample_gates` without probes."""
    x, branch = _inputs(64)
    for theta in (0.0, 0.4, 1.0):
        theta = torch.tensor(theta)
        _, gates = ops.sampled_gated_residual(x, branch, theta, STATE, section)
        draw = ops.sample_gates(theta.expand(4), 64, STATE, torch.zeros(4), scheme="independent")
        assert torch.equal(gates, draw.gates[section])
        assert not gates.requires_grad


@pytest.mark.parametrize(("form", "activation"), KINDS)
def test_equals_gated_residual(form, activation):
    """Value and gradients are those with the returned gates passed in; nothing for theta."""
    x, branch = _inputs()
    theta = torch.tensor(0.5, requires_grad=True)
    y, gates = ops.sampled_gated_residual(x, branch, theta, STATE, 1, activation, form)
    assert 0 < gates.sum() < 12
    expected = ops.gated_residual(x, branch, gates, None, activation, form)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, branch, theta), grad, allow_unused=True)
    assert found[2] is None
    for tensor, want in zip(found, torch.autograd.grad(expected, (x, branch), grad), strict=False):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize(("form", "activation"), KINDS)
def test_gradcheck(form, activation):
    """The redraw makes the operation a function of its inputs."""

    def run(x, branch):
        theta = torch.tensor(0.5)
        return ops.sampled_gated_residual(x, branch, theta, STATE, 1, activation, form)[0]

    assert torch.autograd.gradcheck(run, _inputs(5))


def test_a_changed_state_is_noticed():
    """Advancing the draw number in place between forward and backward is an error."""
    state = STATE.clone()
    y, _ = ops.sampled_gated_residual(*_inputs(), torch.tensor(0.5), state, 0)
    state[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("activation", "rows"), [(None, 0), ("relu", 12)])
def test_nothing_of_the_rows_is_saved(activation, rows):
    """No mask and no branch: theta and the state, and y for ReLU."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.sampled_gated_residual(*_inputs(), torch.tensor(0.5), STATE, 0, activation)
    assert sum(t.shape[0] for t in saved if t.dim() == 4) == rows
    assert all(t.numel() <= 3 for t in saved if t.dim() < 4)


def test_compiles_to_a_full_graph():
    """aot_eager gives the same gates, values and gradients."""
    torch._dynamo.reset()
    x, branch = _inputs()

    def run(x, branch, theta):
        return ops.sampled_gated_residual(x * 2, branch, theta, STATE, 1, "relu")

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y, gates = function(x, branch, torch.tensor(0.5))
        results.append([y, gates, *torch.autograd.grad(y.square().sum(), (x, branch))])
    for tensor, want in zip(*results, strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize(("form", "activation"), KINDS)
def test_opcheck(form, activation):
    """Schema, fakes, autograd registration and dynamic shapes of forward and backward."""
    x, branch = _inputs(dtype=torch.float32)
    theta, relu, lerp = torch.tensor(0.5), activation == "relu", form == "lerp"
    library = torch.ops.layerprune
    torch.library.opcheck(
        library.sampled_gated_residual.default, (x, branch, theta, STATE, 1, relu, lerp)
    )
    y = torch.randn(x.shape) if relu else None
    torch.library.opcheck(
        library.sampled_gated_residual_backward.default,
        (torch.randn(x.shape), y, theta, STATE, 1, lerp),
    )


def value(*case):
    """A case that its values make wrong: those of another device nobody reads."""
    return pytest.param(*case, marks=pytest.mark.cpu_only("values are checked there"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.zeros(3, 3)}, "x and branch must have one shape"),
        ({"theta": torch.tensor([0.5])}, r"theta must be torch.float32 of shape \[\]"),
        value({"theta": torch.tensor(1.5)}, r"theta must lie in \[0, 1\]"),
        ({"theta": torch.tensor(0.5, device="meta")}, "theta is on meta"),
        ({"rng_state": torch.tensor([1, 2])}, "rng_state must be"),
        ({"section": -1}, "section must lie"),
        ({"activation": "tanh"}, "activation must be"),
    ],
)
def test_errors(change, message):
    """Each bad argument is named, with what was got."""
    arguments = {
        "x": torch.zeros(4, 3),
        "branch": torch.zeros(4, 3),
        "theta": torch.tensor(0.5),
        "rng_state": STATE,
        "section": 0,
    }
    with pytest.raises(ValueError, match=message):
        ops.sampled_gated_residual(**(arguments | change))
