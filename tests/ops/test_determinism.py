"""Results are bit-equal from run to run, and for any number of threads."""

import pytest
import torch

from layerprune import ops

LIBRARY = torch.ops.layerprune
KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
COUNTS = [1, 2, 3, 5, 2]
SIZE = 5 * 8192 + 1234
BATCH = 12


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(run, threads):
    """``run`` gives a list of tensors; NaN counts as a difference."""
    results = []
    for count in COUNTS:
        threads(count)
        results.append([t.detach() for t in run()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def case(dtype, size=SIZE):
    slot = torch.full((BATCH,), -1, dtype=torch.int32)
    slot[torch.tensor([7, 0, 3, 11, 5, 2, 9])] = torch.arange(7, dtype=torch.int32)
    gate = torch.linspace(0, 1, BATCH).roll(3)
    return randn(BATCH, size, dtype=dtype), randn(7, size, seed=1, dtype=dtype), gate, slot


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("asked", [None, [2, 7, 1, 5]])
def test_gated_residual(dtype, form, activation, asked, threads):
    """Rows of six segments: values and gradients, sums for the gates among them."""
    x, branch, gate, slot = case(dtype)
    grad = randn(BATCH, SIZE, seed=2, dtype=dtype)
    rows = None if asked is None else torch.tensor(asked)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
        y = ops.gated_residual(*leaves, slot, activation, form, rows)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    check(run, threads)


def test_one_long_row(threads, kernels):
    """A gate's gradient over 100 segments of one row, which several threads share."""
    x, branch = randn(1, 100 * 8192 + 77), randn(1, 100 * 8192 + 77, seed=1)
    gate = torch.full((1,), 0.7)
    grad = randn(*x.shape, seed=2)

    def run():
        leaf = gate.detach().requires_grad_()
        y = ops.gated_residual(x, branch, leaf)
        return [y, *torch.autograd.grad(y, leaf, grad)]

    check(run, threads)


def test_many_small_rows(threads):
    """Rows of one element and of a part of a vector."""
    for size in (1, 13):
        count = 30_000
        x, branch, grad = (randn(count, size, seed=seed) for seed in range(3))
        gate = torch.rand(count, generator=torch.Generator().manual_seed(0))

        def run(x=x, branch=branch, grad=grad, gate=gate):
            leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
            y = ops.gated_residual(*leaves, form="lerp")
            return [y, *torch.autograd.grad(y, leaves, grad)]

        check(run, threads)


def test_rows(threads):
    """Gather, scatter and their gradients."""
    x, d_rest = randn(BATCH, SIZE), randn(BATCH, SIZE, seed=1)
    rows = torch.tensor([11, 0, 4, 7, 5])
    d_rows = randn(5, SIZE, seed=2)

    def run():
        leaf = x.detach().requires_grad_()
        taken, rest = ops.take_rows(leaf, rows)
        added = LIBRARY.scatter_add_rows(x, rows, d_rows)
        return [taken, added, *torch.autograd.grad([taken, rest], leaf, [d_rows, d_rest])]

    check(run, threads)


def test_section(threads):
    """Gather, branch and sum; the rows' gradient is added in place to the shortcut's."""
    x, _, gate, slot = case(torch.float32)
    rows = torch.arange(BATCH)[slot >= 0]
    slot = torch.where(slot >= 0, (slot >= 0).cumsum(0) - 1, -1).int()
    grad = randn(BATCH, SIZE, seed=2)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, gate)]
        taken, rest = ops.take_rows(leaves[0], rows, exclusive=True)
        y = ops.gated_residual(rest, taken.sin(), leaves[1], slot, "relu", gate_grad_rows=rows[::3])
        return [y, *torch.autograd.grad(y, leaves, grad)]

    check(run, threads)


@pytest.mark.parametrize("lerp", [False, True])
def test_gate_factor(lerp, threads):
    """What a gate multiplies."""
    x, branch, _, slot = case(torch.float16)
    asked = torch.tensor([0, 1, 7, 11])

    def run():
        return [LIBRARY.gate_factor(x, branch, slot, rows, lerp) for rows in (None, asked)]

    check(run, threads)


def test_sampled_gated_residual(threads):
    """Gates, values and gradients where the draw is made inside."""
    x, branch, grad = (randn(BATCH, SIZE, seed=seed) for seed in range(3))

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, branch)]
        state = torch.tensor([1, 2, 3])
        y, gates = ops.sampled_gated_residual(*leaves, torch.tensor(0.5), state, 4, "relu")
        return [y, gates, *torch.autograd.grad(y, leaves, grad)]

    check(run, threads)


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
def test_draw(scheme, threads):
    """Every output of the draw."""
    theta = torch.rand(54, generator=torch.Generator().manual_seed(0))

    def run():
        return ops.sample_gates(
            theta, 1000, torch.tensor([1, 2, 3]), theta * 0.1, row_multiple=8, scheme=scheme
        )

    check(run, threads)


def test_projected_step(threads):
    """Theta, statistics and who is in play, after ten steps of 300 sections."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(10, 300, 500, generator=generator)
    counted = torch.rand(10, 300, 500, generator=generator) < 0.5

    def run():
        state = (torch.full((300,), 0.5), torch.zeros(5, 300), torch.zeros(300, dtype=torch.bool))
        for slope, mask in zip(slopes, counted, strict=True):
            ops.projected_gate_step_(
                *state,
                slope,
                mask,
                torch.full((300,), 0.05),
                torch.ones(300, dtype=torch.bool),
                horizon=10.0,
                noise_factor=4.0,
                decay=0.9,
                confidence=1.0,
                max_descending=20,
            )
        return state

    check(run, threads)
