"""Tensors of more than 2**31 elements: every index that counts elements needs 64 bits."""

import pytest
import torch

from layerprune import ops

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("kernels")]

SHAPES = [(2**15 + 1, 2**16), (2, 2**30 + 8)]
"""Many rows, of which element 2**31 begins the last; and one row that holds it."""

DTYPE = torch.bfloat16
NEEDED = 12 * 2**31 * DTYPE.itemsize
"""Bytes: six such tensors, and the sums of one of them in float32."""


@pytest.fixture(autouse=True)
def room():
    """Skips the test where the GPU has too little memory."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory on the GPU")
    yield
    torch.cuda.empty_cache()


def numbers(shape, seed):
    """Normal numbers: a prime number of them over and over, which no two rows begin alike."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randn(1_000_003, generator=generator).to("cuda", DTYPE)
    total = shape[0] * shape[1]
    return some.repeat(total // some.numel() + 1)[:total].view(shape)


def places(shape):
    """Rows and columns at the ends of the tensor and around element 2**31."""
    rows, size = shape
    row, column = divmod(2**31, size)
    return sorted({0, 1, rows // 2, row - 1, row, rows - 1}), sorted(
        {0, 1, size // 2, max(column - 1, 0), column, min(column + 1, size - 1), size - 1}
    )


def at(tensor, rows, columns):
    """Some rows and columns, in float64."""
    return torch.stack([tensor[row][columns] for row in rows]).double()


def close(found, exact):
    """To the nearest number, or the one beside it where a product was rounded before a sum."""
    torch.testing.assert_close(found, exact, rtol=2**-8, atol=2**-16)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape):
    """The rows of the branch in reverse; the last gate is a probe, whose gradient sums a row."""
    batch, size = shape
    x, branch, grad = (numbers(shape, seed) for seed in range(3))
    gate = torch.linspace(1, 0.25, batch, device="cuda").requires_grad_()
    slot = torch.arange(batch - 1, -1, -1, dtype=torch.int32, device="cuda")
    asked = torch.tensor([batch - 1], device="cuda")
    x.requires_grad_()
    branch.requires_grad_()
    y = ops.gated_residual(x, branch, gate, slot, "relu", gate_grad_rows=asked)
    y.backward(grad)
    rows, columns = places(shape)
    mirrored = [batch - 1 - row for row in rows]
    weights = gate.detach()[rows].double()[:, None]
    values = at(branch.detach(), mirrored, columns)
    exact = (at(x.detach(), rows, columns) + weights * values).relu()
    close(at(y.detach(), rows, columns), exact)
    passed = torch.where(at(y.detach(), rows, columns) > 0, at(grad, rows, columns), 0)
    assert torch.equal(at(x.grad, rows, columns), passed)
    close(at(branch.grad, mirrored, columns), weights * passed)
    last = torch.where(y.detach()[-1] > 0, grad[-1], 0).float() * branch.detach()[0].float()
    # Products of size 1 with random signs, each and every sum of them rounded to float32.
    want = last.sum(dtype=torch.float64).item()
    assert gate.grad[-1].item() == pytest.approx(want, rel=1e-4, abs=1e-3 * size**0.5)
    assert gate.grad[:-1].eq(0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_take_rows(shape):
    """All rows in reverse, and the sum of both gradients."""
    batch, _ = shape
    x = numbers(shape, 0).requires_grad_()
    order = torch.arange(batch - 1, -1, -1, device="cuda")
    taken, rest = ops.take_rows(x, order, exclusive=True)
    rows, columns = places(shape)
    mirrored = [batch - 1 - row for row in rows]
    assert torch.equal(at(taken.detach(), mirrored, columns), at(x.detach(), rows, columns))
    d_taken, d_rest = numbers(shape, 1), numbers(shape, 2)
    kept = at(d_rest, rows, columns)
    (found,) = torch.autograd.grad([taken, rest], x, [d_taken, d_rest])
    close(at(found, rows, columns), kept + at(d_taken, mirrored, columns))


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_gated_residual(shape):
    """Stochastic depth by the gates that it returns."""
    x, branch, grad = (numbers(shape, seed) for seed in range(3))
    x.requires_grad_()
    branch.requires_grad_()
    theta, state = torch.tensor(0.5, device="cuda"), torch.tensor([1, 2, 3], device="cuda")
    y, gates = ops.sampled_gated_residual(x, branch, theta, state, 0)
    y.backward(grad)
    rows, columns = places(shape)
    weights = gates[rows].double()[:, None]
    exact = at(x.detach(), rows, columns) + weights * at(branch.detach(), rows, columns)
    close(at(y.detach(), rows, columns), exact)
    assert torch.equal(at(x.grad, rows, columns), at(grad, rows, columns))
    assert torch.equal(at(branch.grad, rows, columns), weights * at(grad, rows, columns))
