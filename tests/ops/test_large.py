"""Rows of more than one segment, and tensors so large that results are written past the caches.

The compiled kernels work on rows in segments of 8,192 elements. They write past the caches where an
operation moves 32 MiB or more and every row of the result is a multiple of 32 bytes.
"""

import math

import pytest
import torch

from layerprune import ops

LIBRARY = torch.ops.layerprune
KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEGMENT = 8192
SIZES = [SEGMENT - 1, SEGMENT + 1, 2 * SEGMENT + 5]
ALIGNED = 2 * SEGMENT + 16


def randn(*shape, seed=0, dtype=torch.float64):
    """Normal numbers; a prime number of them over and over, which no two rows begin alike."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randn(100_003, generator=generator, dtype=torch.float32).to(dtype)
    total = math.prod(shape)
    return some.repeat(total // some.numel() + 1)[:total].view(shape)


def rows_of(mib, size, dtype):
    """The number of rows that is no less than so many MiB."""
    return -(-(mib << 20) // (size * dtype.itemsize))


def case(size, batch, dtype):
    """Gates 0, 1 and between; slots for two rows of three, in no order; a branch row unread."""
    generator = torch.Generator().manual_seed(1)
    count = batch * 2 // 3
    x, branch, grad = (
        randn(n, size, seed=seed, dtype=dtype) for seed, n in enumerate((batch, count, batch))
    )
    gate, kind = torch.rand(batch, generator=generator), torch.arange(batch) % 4
    gate = torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, gate))
    slot = torch.full((batch,), -1, dtype=torch.int32)
    order = torch.randperm(batch, generator=generator)[:count]
    slot[order] = torch.arange(count, dtype=torch.int32)
    slot[order[0]] = -1
    asked = torch.randperm(batch, generator=generator)[: batch // 3]
    return x, branch, grad, gate, slot, asked


def differentiate(x, branch, grad, gate, slot, form, activation, asked):
    """Value and gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
    y = ops.gated_residual(*leaves, slot, activation, form, asked)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check_rows(gated, rows, found, x, branch, grad, gate, slot, form, activation, asked):
    """Compares what was found for some rows of x with the formula in float64."""
    y, d_x, d_branch, d_gate = found
    has = slot[rows] >= 0
    places = slot[rows][has].long()
    own_slot = torch.where(has, has.cumsum(0) - 1, -1).int()
    own_asked = None if asked is None else torch.isin(rows, asked).nonzero().squeeze(1)
    plain = (gate[rows], own_slot, form, activation)
    results = []
    for dtype in (torch.float64, x.dtype):
        own = [t.to(dtype) for t in (x[rows], branch[places])]
        results.append([gated.sum(*own, *plain)])
        results[-1] += gated.gradients(grad[rows].to(dtype), y[rows], *own, *plain, own_asked)
    for tensor, exact, eager in zip((y[rows], d_x[rows], d_branch[places]), *results, strict=False):
        gated.close(tensor, exact, eager)
    # Sums of products of about 1, with lerp of 2, with random signs; each in float32.
    assert (d_gate[rows] - results[0][3]).abs().max() < 2e-6 * x.shape[1] ** 0.5
    assert d_branch[0].eq(0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("probed", [False, True])
def test_rows_of_several_segments(size, dtype, form, activation, probed, gated):
    """Sizes that are no multiples of a segment or of a vector."""
    *tensors, asked = case(size, 9, dtype)
    arguments = (*tensors, form, activation, asked if probed else None)
    check_rows(gated, torch.arange(9), differentiate(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("probed", [False, True])
def test_past_the_caches(dtype, form, activation, probed, gated):
    """More than 32 MiB: right in every fifth row, elsewhere the same as rows that are not aligned.

    The backward moves less where fewer rows have a branch; both are above 32 MiB.
    """
    batch = rows_of(13, ALIGNED, dtype)
    x, branch, grad, gate, slot, asked = case(ALIGNED, batch, dtype)
    arguments = (gate, slot, form, activation, asked if probed else None)
    found = differentiate(x, branch, grad, *arguments)
    rows = torch.arange(0, batch, 5)
    check_rows(gated, rows, found, x, branch, grad, *arguments)
    shorter = differentiate(x[:, :-1], branch[:, :-1], grad[:, :-1], *arguments)
    for tensor, other in zip(found[:3], shorter[:3], strict=True):
        assert torch.equal(tensor[:, :-1], other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter(dtype):
    """Rows taken and rows added at all these sizes, past the caches too; exact."""
    for size in (*SIZES, ALIGNED):
        batch = rows_of(22, size, dtype) if size == ALIGNED else 9
        rows = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
        rows = rows[: batch * 7 // 9]
        x, source = randn(batch, size, dtype=dtype), randn(len(rows), size, seed=1, dtype=dtype)
        assert torch.equal(LIBRARY.gather_rows(x, rows), x[rows])
        want = x.clone()
        want[rows] += source
        assert torch.equal(LIBRARY.scatter_add_rows(x, rows, source), want)
        LIBRARY.scatter_add_rows_(x, rows, source)
        assert torch.equal(x, want)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("size", [2 * SEGMENT + 5, ALIGNED])
def test_take_rows(exclusive, size):
    """The gradient of both outputs, summed; the ReLU in front holds what is not ours."""
    batch = rows_of(22, size, torch.float32)
    x, rows = randn(batch, size).float().requires_grad_(), torch.arange(1, batch, 2)
    taken, rest = ops.take_rows(x, rows, exclusive=exclusive)
    d_taken, d_rest = randn(len(rows), size, seed=1).float(), randn(batch, size, seed=2).float()
    want = d_rest.clone()
    want[rows] += d_taken
    (found,) = torch.autograd.grad([taken, rest], x, [d_taken, d_rest])
    assert torch.equal(taken, x[rows]) and torch.equal(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lerp", [False, True])
def test_gate_factor(dtype, lerp):
    """The difference of rows, widened, at all these sizes; exact."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for size in (*SIZES, ALIGNED):
        batch = rows_of(22, size, dtype) if size == ALIGNED else 9
        x, branch, _, _, slot, _ = case(size, batch, dtype)
        asked = (torch.arange(batch) % 5 != 0).nonzero().squeeze(1)
        found = LIBRARY.gate_factor(x, branch, slot, asked, lerp)
        place = slot[asked].long()
        want = branch[place.clamp(min=0)].to(wide if lerp else dtype)
        if lerp:
            want -= x[asked]
        want[place < 0] = 0
        assert found.dtype == want.dtype and torch.equal(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled(dtype):
    """Stochastic depth past the caches: rows are those of x, or of the sum."""
    batch = rows_of(12, ALIGNED, dtype)
    x, branch, grad = (randn(batch, ALIGNED, seed=seed, dtype=dtype) for seed in range(3))
    theta, state = torch.tensor(0.5), torch.tensor([1, 2, 3])
    y, gates = LIBRARY.sampled_gated_residual(x, branch, theta, state, 0, True, False)
    assert 0.3 < gates.mean() < 0.7
    on = gates == 1
    assert torch.equal(y[on], (x[on] + branch[on]).relu()) and torch.equal(y[~on], x[~on].relu())
    found = LIBRARY.sampled_gated_residual_backward(grad, y, theta, state, 0, False)
    passed = torch.where(y > 0, grad, 0)
    assert torch.equal(found[0], passed)
    assert torch.equal(found[1], torch.where(on[:, None], passed, 0))
