"""Results are bit-equal from run to run, whatever the number of threads."""

import pytest
import torch

from layerprune import ops

KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
ROWS, SIZE = 24, 3 * 8192 + 5


def _tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (
        torch.randn(count, SIZE, generator=generator).to(dtype) for count in (ROWS, ROWS // 2, ROWS)
    )
    slot = torch.full((ROWS,), -1, dtype=torch.int32)
    slot[torch.randperm(ROWS, generator=generator)[: ROWS // 2]] = torch.arange(
        ROWS // 2, dtype=torch.int32
    )
    return x, branch, grad, torch.rand(ROWS, generator=generator), slot


def _everywhere(function, threads):
    """The results of the first call, after it was compared with those at other thread numbers."""
    threads(1)
    first = function()
    for count in (1, 2, 3, 5):
        threads(count)
        for found, want in zip(function(), first, strict=True):
            assert torch.equal(found, want), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("form", "activation"), KINDS)
def test_gated_residual(dtype, form, activation, threads):
    """Value and all gradients; the gate's is a sum over four segments of a row."""
    x, branch, grad, gate, slot = _tensors(dtype)
    leaves = [t.requires_grad_() for t in (x, branch, gate)]

    def run():
        y = ops.gated_residual(*leaves, slot, activation, form)
        return y, *torch.autograd.grad(y, leaves, grad)

    _everywhere(run, threads)


def test_section(threads):
    """Gather, branch, sum, and the rows' gradient added in place to the shortcut's."""
    x, _, grad, gate, slot = _tensors(torch.float32)
    x.requires_grad_()
    gate.requires_grad_()
    rows = (slot >= 0).nonzero().squeeze(1)
    slot[rows] = torch.arange(len(rows), dtype=torch.int32)

    def run():
        taken, rest = ops.take_rows(x, rows, exclusive=True)
        y = ops.gated_residual(rest, taken.sin(), gate, slot, "relu", gate_grad_rows=rows[::3])
        return y, *torch.autograd.grad(y, (x, gate), grad)

    _everywhere(run, threads)


def test_sampled(threads):
    """Stochastic depth: gates, value and gradients."""
    x, _, grad, *_ = _tensors(torch.float32)
    branch = x.flip(1).clone().requires_grad_()
    x.requires_grad_()

    def run():
        y, gates = ops.sampled_gated_residual(
            x, branch, torch.tensor(0.5), torch.tensor([1, 2, 3]), 4, "relu"
        )
        return y, gates, *torch.autograd.grad(y, (x, branch), grad)

    _everywhere(run, threads)


def test_projected_step(threads):
    """The state after five steps of 700 sections."""
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(5, 700, 300, generator=generator)
    counted = torch.rand(5, 700, 300, generator=generator) < 0.2
    penalty, free = torch.full((700,), 0.05), torch.ones(700, dtype=torch.bool)

    def run():
        theta, statistics = torch.full((700,), 0.5), torch.zeros(5, 700)
        in_play = torch.zeros(700, dtype=torch.bool)
        for slope, mask in zip(slopes, counted, strict=True):
            ops.projected_gate_step_(
                theta,
                statistics,
                in_play,
                slope,
                mask,
                penalty,
                free,
                horizon=10,
                noise_factor=4,
                decay=0.9,
                confidence=1,
                max_descending=7,
            )
        return theta, statistics, in_play

    _everywhere(run, threads)
