"""Kernels on rows against the eager specification, in every dtype and layout."""

import pytest
import torch

from layerprune.kernels import OPERATORS, residual, rows
from layerprune.ops import reference, registration

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
B, K = 6, 4
SHAPES = [(5,), (3, 2, 4), (2100,)]  # the last has two segments
SLOTS = [None, [2, -1, 0, 3, -1, 1], [-1, -1, 1, -1, -1, -1]]


def channels_last(tensor):
    """Where there are channels; elsewhere the tensor."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(tensor):
    """The same numbers, every second one of a larger tensor."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def sliced(tensor):
    """Rows that are dense, with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 1)[:, 0]


LAYOUTS = [torch.Tensor.contiguous, channels_last, strided, sliced]


def tensors(shape, dtype, layout, slots, seed=0):
    """Input, branch, gradient, gate and slot; gates of 0, of 1 and between them."""
    generator = torch.Generator().manual_seed(seed)
    count = B if slots is None else K
    x, branch, grad = (
        layout(torch.randn(n, *shape, generator=generator).to(dtype)) for n in (B, count, B)
    )
    gate = torch.tensor([0.0, 1.0, 0.25, 0.75, 1.0, 0.5])
    return x, branch, grad, gate, None if slots is None else torch.tensor(slots, dtype=torch.int32)


def close(found, expected):
    """Equal shapes, strides and dtypes; numbers but for the order of a sum and one rounding."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.stride() == expected.stride() or found.numel() == 0
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=64 * eps)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(("relu", "lerp"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_residual(shape, dtype, layout, relu, lerp, slots):
    """Forward, what is kept of the branch, and backward."""
    x, branch, grad, gate, slot = tensors(shape, dtype, layout, slots)
    y = reference.gated_residual(x, branch, gate, slot, relu, lerp)
    close(residual.gated_residual(x, branch, gate, slot, None, relu, lerp), y)
    for asked in (None, torch.tensor([4, 0, 2])):
        factor = reference.gate_factor(x, branch, slot, asked, lerp)
        close(rows.gate_factor(x, branch, slot, asked, lerp), factor)
        kept = y if relu else None
        arguments = (grad, kept, gate, slot, factor, asked, branch.shape[0], lerp)
        expected = reference.gated_residual_backward(*arguments)
        for found, want in zip(residual.gated_residual_backward(*arguments), expected, strict=True):
            close(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_segments(dtype):
    """One gate's gradient is a sum of sums."""
    x, branch, grad, gate, slot = tensors(SHAPES[2], dtype, torch.Tensor.contiguous, SLOTS[1])
    close(
        residual.gated_residual(x, branch, gate, slot, None, False, False),
        reference.gated_residual(x, branch, gate, slot, False, False),
    )
    arguments = (grad, None, gate, slot, branch, None, K, False)
    found = residual.gated_residual_backward(*arguments)
    expected = reference.gated_residual_backward(*arguments)
    close(found[0], expected[0])
    close(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-4)


def test_no_gate_gradient():
    """Nothing of the branch is needed then."""
    x, branch, grad, gate, slot = tensors((3,), torch.float32, sliced, SLOTS[1])
    arguments = (grad, None, gate, slot, None, None, K, False)
    expected = reference.gated_residual_backward(*arguments)
    for found, want in zip(residual.gated_residual_backward(*arguments), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("lerp", [False, True])
def test_sampled(lerp):
    """The gates of the independent scheme, drawn again in the backward."""
    x, branch, grad, _, _ = tensors((7,), torch.float32, torch.Tensor.contiguous, None)
    state, theta = torch.tensor([3, 5, 2**32 - 20]), torch.tensor(0.5)
    arguments = (theta, state, 4)
    found = residual.sampled_gated_residual(x, branch, *arguments, not lerp, lerp)
    expected = registration._sampled_forward(x, branch, *arguments, not lerp, lerp)
    assert torch.equal(found[1], expected[1]) and 0 < found[1].sum() < B
    close(found[0], expected[0])
    kept = None if lerp else expected[0]
    found = residual.sampled_gated_residual_backward(grad, kept, *arguments, lerp)
    expected = registration._sampled_backward_reference(grad, kept, *arguments, lerp)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter(dtype, layout):
    x, source, *_ = tensors((3, 2, 4), dtype, layout, SLOTS[1])
    chosen = torch.tensor([5, 0, 3, 2])
    close(rows.gather_rows(x, chosen), torch.ops.layerprune.gather_rows(x, chosen))
    base = x.clone(memory_format=reference.row_format(x))
    found = rows.scatter_add_rows(base, chosen, source)
    assert torch.equal(base, x)
    close(found, torch.ops.layerprune.scatter_add_rows(base, chosen, source))


def test_numbers_that_are_none_pass():
    """ReLU keeps what is not a number; a closed gate does not read the branch."""
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -1.0]] * 2)
    branch = torch.full((2, 4), torch.nan)
    y = residual.gated_residual(x, branch, torch.zeros(2), None, None, True, False)
    torch.testing.assert_close(y, x.relu(), equal_nan=True, rtol=0, atol=0)


def test_absurd_indices_harm_nothing():
    """Out of range is absent: on a device nobody has looked."""
    x = torch.ones(3, 2)
    assert rows.gather_rows(x, torch.tensor([-5, 1, 9])).tolist() == [[0, 0], [1, 1], [0, 0]]
    rows.scatter_add_rows_(out := x.clone(), torch.tensor([7, -1, 2]), x)
    assert out.tolist() == [[1, 1], [1, 1], [2, 2]]
    slot = torch.tensor([5, -9, 0], dtype=torch.int32)
    y = residual.gated_residual(x, x[:1], torch.ones(3), slot, None, False, False)
    assert y.tolist() == [[1, 1], [1, 1], [2, 2]]


def test_empty():
    for count, size in ((0, 3), (2, 0)):
        x, gate = torch.zeros(count, size), torch.ones(count)
        assert residual.gated_residual(x, x, gate, None, None, True, False).shape == x.shape
        found = residual.gated_residual_backward(x, x, gate, None, x, None, count, False)
        assert [f.shape for f in found] == [x.shape, x.shape, gate.shape]
        assert not found[2].any()
    nobody = torch.full((2,), -1, dtype=torch.int32)
    x, none = torch.ones(2, 3), torch.zeros(0, 3)
    y = residual.gated_residual(x, none, torch.zeros(2), nobody, None, False, False)
    assert torch.equal(y, x)
    assert rows.gather_rows(x, torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def test_every_operator_has_a_kernel():
    names = {
        name.removeprefix("layerprune::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("layerprune::")
    }
    assert set(OPERATORS) == names
