"""Any strides of the small arguments: gates, slots, lists of rows, probabilities."""

import pytest
import torch

LIBRARY = torch.ops.layerprune


def strided(t):
    """Every other element; those between would be noticed."""
    return torch.stack((t, torch.full_like(t, 99)), -1)[:, 0]


def offset(t):
    """One element behind an aligned address."""
    return torch.cat((t[:1], t))[1:]


@pytest.mark.parametrize("make", [strided, offset])
def test_gates_slots_and_rows(make, gated):
    """Value, gate gradient, gather and scatter with lists that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (
        torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (4, 3, 4)
    )
    gate = make(torch.tensor([0.5, 1.0, 0.0, 0.25])).requires_grad_()
    slot = make(torch.tensor([2, -1, 0, 1], dtype=torch.int32))
    rows = make(torch.tensor([3, 0]))
    y = LIBRARY.gated_residual(x, branch, gate, slot, rows, False, True)
    plain = (gate.detach(), slot, "lerp")
    gated.close(y, gated.sum(x, branch, *plain))
    (found,) = torch.autograd.grad(y, gate, grad)
    want = gated.gradients(grad, y, x, branch, *plain, None, rows)[2]
    torch.testing.assert_close(found, want.float())
    assert torch.equal(LIBRARY.gather_rows(x, rows), x[rows])
    added = LIBRARY.scatter_add_rows(x, rows, grad[:2])
    assert torch.equal(added, x.index_add(0, rows, grad[:2]))


def test_one_gate_and_slot_for_all(gated):
    """Broadcast gates, and the slot -1 for all rows."""
    x, branch = torch.ones(4, 7).double(), torch.full((4, 7), 2.0).double()
    gate = torch.tensor([0.5]).expand(4)
    assert LIBRARY.gated_residual(x, branch, gate, None, None, False, False).eq(2).all()
    slot = torch.tensor([-1], dtype=torch.int32).expand(4)
    assert LIBRARY.gated_residual(x, branch, gate, slot, None, False, False).eq(1).all()
    d_x, d_branch, _ = LIBRARY.gated_residual_backward(x, None, gate, slot, None, None, 4, False)
    assert torch.equal(d_x, x) and d_branch.eq(0).all()


@pytest.mark.parametrize("make", [strided, offset])
@pytest.mark.parametrize("scheme", ["systematic", "independent"])
def test_draw(make, scheme):
    """theta, probe_rate and rng_state of the draw; a broadcast probe rate."""
    theta, rate, state = torch.tensor([0.2, 0.7]), torch.tensor([0.1, 0.1]), torch.tensor([3, 1, 9])
    want = LIBRARY.sample_gates(theta, 40, state, rate, 1, 2, scheme)
    for given in (make(rate), rate[:1].expand(2)):
        found = LIBRARY.sample_gates(make(theta), 40, make(state), given, 1, 2, scheme)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("make", [strided, offset])
def test_sampled(make):
    """rng_state of the operation that draws inside."""
    x, theta, state = torch.ones(40, 3), torch.tensor(0.5), torch.tensor([3, 1, 9])
    want = LIBRARY.sampled_gated_residual(x, x, theta, state, 2, False, False)
    found = LIBRARY.sampled_gated_residual(x, x, theta, make(state), 2, False, False)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
