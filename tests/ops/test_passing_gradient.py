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
    """In memory too; the branch's is the one that is computed beside a copy."""
    x, branch, grad = _tensors()
    other = branch.requires_grad_()
    inner = x.clone().requires_grad_() * 1
    d_x, d_branch = torch.autograd.grad(operation(inner, other), (inner, other), grad)
    assert d_x.data_ptr() == grad.data_ptr()
    expected = torch.autograd.grad(operation(x, other), other, grad)[0]
    assert d_branch.equal(expected) and d_branch.data_ptr() != grad.data_ptr()


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


WAYS = {"leaf": lambda x: x, "clone": torch.clone, "function": _Identity.apply}


@KINDS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_two_parameters_have_gradients_of_their_own(operation, way, backend):
    """Behind nodes that hand a gradient on: accumulated twice, as PyTorch's sum gives them."""
    if way == "function" and backend is not None:
        pytest.skip("a function that returns a view of its input does not compile")
    reach = WAYS[way]
    first, second, one = (torch.nn.Parameter(torch.ones(B, 3)) for _ in range(3))
    branch = torch.ones(B, 3)

    def add(x):
        return operation(reach(x), branch)

    if backend is not None:
        torch._dynamo.reset()
        add = torch.compile(add, backend=backend)
    for _ in range(2):
        ((add(first) + add(second) + add(one) * 0) * 3).sum().backward()
    assert first.grad.eq(6).all() and second.grad.eq(6).all() and one.grad.eq(0).all()
    first.grad.mul_(0)
    assert second.grad.eq(6).all()


def test_behind_a_hook_of_a_module():
    """Its node hands the gradient on as well."""

    class Add(torch.nn.Module):
        def forward(self, x):
            return _sum(x, torch.ones(B, 3))

    module = Add()
    module.register_full_backward_hook(lambda *_: None)
    first, second = (torch.nn.Parameter(torch.ones(B, 3)) for _ in range(2))
    for _ in range(2):
        ((module(first) + module(second)) * 3).sum().backward()
    assert first.grad.eq(6).all() and second.grad.eq(6).all()


def test_the_callers_gradient_stays_the_callers():
    x, branch, grad = _tensors()
    leaf = x.requires_grad_()
    _sum(leaf, branch).backward(grad)
    assert leaf.grad.equal(grad) and leaf.grad.data_ptr() != grad.data_ptr()


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
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_gathered_rows_are_not_added_to_it(exclusive, backend):
    """All rows gathered and no slots: the incoming gradient belongs to the caller."""
    x, _, grad = _tensors()
    leaf = x.requires_grad_()
    before = grad.clone()
    taken, rest = ops.take_rows(leaf * 1, torch.arange(B), exclusive=exclusive)
    add = _sum
    if backend is not None:
        torch._dynamo.reset()
        add = torch.compile(_sum, backend=backend)
    y = add(rest, taken * 2)
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
