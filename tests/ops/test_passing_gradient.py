"""Where the gradient of x is the incoming one, it is passed on and not copied."""

import pytest
import torch

from layerprune import ops

LIBRARY = torch.ops.layerprune
B = 5


def _tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, 4, generator=generator).to(dtype) for _ in range(3)]


def _sum(x, branch, **options):
    return ops.gated_residual(x, branch, torch.linspace(0, 1, B), **options)


def _sampled(x, branch, **options):
    state = torch.tensor([1, 2, 3])
    return ops.sampled_gated_residual(x, branch, torch.tensor(0.5), state, 1, **options)[0]


KINDS = pytest.mark.parametrize("operation", [_sum, _sampled], ids=["given", "sampled"])


@KINDS
def test_it_is_the_incoming_gradient(operation):
    """In memory too, unless x is a leaf, whose gradient stays; the branch's is the same."""
    x, branch, grad = _tensors()
    leaf, other = x.clone().requires_grad_(), branch.requires_grad_()
    inner = leaf * 1
    for source, passes in ((inner, True), (leaf, False)):
        y = operation(source, other)
        d_x, d_branch = torch.autograd.grad(y, (source, other), grad, retain_graph=True)
        assert d_x.equal(grad)
        assert (d_x.data_ptr() == grad.data_ptr()) is passes
        expected = torch.autograd.grad(operation(x.requires_grad_(), other), other, grad)[0]
        assert d_branch.equal(expected) and d_branch.data_ptr() != grad.data_ptr()


@KINDS
@pytest.mark.parametrize("options", [{"activation": "relu"}, {"form": "lerp"}], ids=str)
def test_not_where_the_sum_changes_it(operation, options):
    x, branch, grad = _tensors()
    inner = x.requires_grad_() * 1
    (d_x,) = torch.autograd.grad(operation(inner, branch, **options), inner, grad)
    assert not d_x.equal(grad) and d_x.data_ptr() != grad.data_ptr()


@KINDS
def test_no_gradient_of_x(operation):
    """Only the branch's is asked for."""
    x, branch, grad = _tensors()
    (alone,) = torch.autograd.grad(operation(x, branch.requires_grad_()), branch, grad)
    (beside, _) = torch.autograd.grad(operation(x.requires_grad_(), branch), (branch, x), grad)
    assert alone.equal(beside)


@pytest.mark.parametrize("exclusive", [False, True])
def test_gathered_rows_are_not_added_to_it(exclusive):
    """All rows gathered and no slots: the incoming gradient belongs to the caller."""
    x, _, grad = _tensors()
    leaf = x.requires_grad_()
    before = grad.clone()
    taken, rest = ops.take_rows(leaf * 1, torch.arange(B), exclusive=exclusive)
    y = _sum(rest, taken * 2)
    (d_x,) = torch.autograd.grad(y, leaf, grad)
    assert grad.equal(before)
    torch.testing.assert_close(d_x, grad * (1 + 2 * torch.linspace(0, 1, B).view(-1, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [None, [1, -1, 0, 2, -1]])
def test_the_operators_leave_it_out(dtype, slots):
    """No rows in its place; the other gradients bit for bit as beside it."""
    _, branch, grad = _tensors(dtype)
    gate, slot = torch.linspace(0, 1, B), None
    if slots is not None:
        slot, branch = torch.tensor(slots, dtype=torch.int32), branch[:3]
    arguments = (grad, None, gate, slot, branch, None, branch.shape[0], False)
    expected = LIBRARY.gated_residual_backward(*arguments)
    found = LIBRARY.gated_residual_backward(*arguments, False)
    assert found[0].shape == (0, 3, 4) and found[0].dtype == dtype
    assert found[1].equal(expected[1]) and found[2].equal(expected[2])
    sampled = (grad, None, torch.tensor(0.5), torch.tensor([1, 2, 3]), 1, False)
    nothing, d_branch = LIBRARY.sampled_gated_residual_backward(*sampled, False)
    assert nothing.shape == (0, 3, 4)
    assert d_branch.equal(LIBRARY.sampled_gated_residual_backward(*sampled)[1])
    torch.library.opcheck(LIBRARY.gated_residual_backward.default, (*arguments, False))
    torch.library.opcheck(LIBRARY.sampled_gated_residual_backward.default, (*sampled, False))


def test_a_chain_in_training():
    """Sections one behind the other, gradients accumulated twice: as plain PyTorch's."""
    x, first, second = _tensors()
    weights = [t.requires_grad_() for t in (x, first, second)]

    def plain(x, branch):
        return x + torch.linspace(0, 1, B, dtype=x.dtype).view(-1, 1, 1) * branch

    gradients = []
    for add in (_sum, plain):
        for weight in weights:
            weight.grad = None
        for _ in range(2):
            y = add(add(x, first * x), second * 2)
            (y * y.detach()).sum().backward()
        gradients.append([weight.grad.clone() for weight in weights])
    torch.testing.assert_close(*gradients)
