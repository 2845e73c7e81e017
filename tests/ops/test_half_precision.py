"""float16 and bfloat16: every bit pattern is read as its number, and rounded as torch rounds."""

import numpy as np
import pytest
import torch

from layerprune import ops

LIBRARY = torch.ops.layerprune
DTYPES = [torch.float16, torch.bfloat16]


def patterns(dtype):
    """All 65,536 numbers, [4096, 16]."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(4096, 16)


def same(found, want):
    """Bit for bit; one NaN is as good as another."""
    assert found.dtype == want.dtype and found.shape == want.shape
    integers = torch.int32 if found.dtype == torch.float32 else torch.int16
    equal = found.contiguous().view(integers) == want.contiguous().view(integers)
    wrong = ~(equal | (found.isnan() & want.isnan()))
    assert not wrong.any(), (found[wrong][:5], want[wrong][:5])


def halves(numbers, dtype):
    """float32 to the nearest, ties to even, on the bits: what IEEE 754 says, in NumPy."""
    numbers = numbers.cpu().numpy()
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.as_tensor(numbers.astype(np.float16))
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(numbers), 0x7FC0, rounded)
    return torch.as_tensor(rounded.astype(np.uint16).view(np.int16)).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading(dtype):
    """The difference from 0, which is float32, is the number itself."""
    every = patterns(dtype)
    found = LIBRARY.gate_factor(torch.zeros_like(every), every, None, None, True)
    # -0 - 0 is -0.
    same(found, every.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 1, 11])
def test_rounding(dtype, size):
    """The product of a gate and 1, for float32 gates at, between and beside all the numbers.

    Rows of 8 go through whole vectors, rows of 1 and 11 through the rest of one too.
    """
    every = patterns(dtype).flatten().float()
    every = every[every.isfinite()].unique()
    between = (every[1:].double() + every[:-1].double()).div(2).float()
    largest = torch.finfo(dtype).max
    limit = torch.tensor([largest, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-45, -1e-30])
    gate = torch.cat([every, between, limit])
    beside = [gate, torch.nextafter(gate, torch.tensor(9e37)), torch.nextafter(gate, -gate)]
    # The first number that rounds to infinity is the middle between the largest and the next.
    middle = torch.tensor([0x477FF000 if dtype == torch.float16 else 0x7F7F8000]).int()
    middle = middle.view(torch.float32)
    beside += [middle, -middle, torch.nextafter(middle, torch.tensor(0.0))]
    gate = torch.cat(beside)
    gate = gate[gate != 0]  # at gate 0 nothing is computed
    one = torch.ones(1, size, dtype=dtype).expand(len(gate), size)
    found = ops.gated_residual(torch.zeros_like(one), one, gate)
    same(found, halves(gate, dtype)[:, None].expand(-1, size))
    same(found, gate.to(dtype)[:, None].expand(-1, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [0.5, 0.75, 1.0])
def test_weighted_branch(dtype, gate):
    """Beside a stream of zeros; halving makes a tie of every odd subnormal number."""
    every = patterns(dtype)
    found = ops.gated_residual(torch.zeros_like(every), every, torch.full((4096,), gate))
    same(found, halves(0.0 + gate * every.float(), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_sums(dtype, activation):
    """x + branch for pairs of all kinds, as torch adds and as torch rectifies: NaN stays."""
    every = patterns(dtype)
    for shift in (0, 1, 1 << 15, (1 << 15) + 1, 12_345, 40_000):
        other = every.flatten().roll(shift).view_as(every)
        found = ops.gated_residual(every, other, torch.ones(4096), None, activation)
        want = halves(every.float() + other.float(), dtype)
        # Of the two zeros ReLU may give either.
        same(found if activation is None else found + 0, want if activation is None else relu(want))
        assert torch.equal(found.isnan(), (every + other).isnan())


def relu(t):
    return torch.where(t < 0, 0, t) + 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_only_passed_on(dtype):
    """A closed gate's row and a row that is gathered keep their bits; so does the gradient."""
    every = patterns(dtype)
    integers = every.view(torch.int16)
    shut = torch.zeros(4096)
    for form in ("add", "lerp"):
        found = ops.gated_residual(every, every.flip(0), shut, form=form)
        assert torch.equal(found.view(torch.int16), integers)
    rows = torch.arange(4095, -1, -1)
    assert torch.equal(LIBRARY.gather_rows(every, rows).view(torch.int16), integers.flip(0))
    d_x, d_branch, _ = LIBRARY.gated_residual_backward(
        every, None, torch.ones(4096), None, None, None, 4096, False
    )
    same(d_x, every)
    same(d_branch, every)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_at_one(dtype):
    """An open gate's row is the branch's, bit for bit, whatever x holds; beside a probe too."""
    every = patterns(dtype)
    for first in (1.0, 0.5, 0.0):
        gate = torch.ones(4096)
        gate[0] = first
        found = ops.gated_residual(every, every.flip(0), gate, form="lerp")
        assert torch.equal(found.view(torch.int16)[1:], every.flip(0).view(torch.int16)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_of_a_closed_gate(dtype):
    """NaN is handed on, in the sum and in what its gradient passes."""
    every = patterns(dtype)
    y = ops.gated_residual(every, every, torch.zeros(4096), None, "relu")
    same(y + 0, relu(every))
    assert torch.equal(y.isnan(), every.isnan())
    ones = torch.ones_like(every)
    shut = torch.zeros(4096)
    d_x, _, _ = LIBRARY.gated_residual_backward(ones, y, shut, None, None, None, 4096, False)
    want = torch.ops.aten.threshold_backward(ones, y, 0)
    assert torch.equal(d_x, want) and torch.equal(d_x == 1, every.isnan() | (every > 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_branch(dtype):
    """The product with the gate, rounded once."""
    every = patterns(dtype)
    gate = torch.linspace(0.01, 1, 4096)
    _, found, _ = LIBRARY.gated_residual_backward(every, None, gate, None, None, None, 4096, False)
    same(found, halves(every.float() * gate[:, None], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation(dtype):
    """As torch.lerp in float32, rounded once; the formula changes sides at a half.

    One rounding in float32 may differ by whether the product is rounded before the sum: the bits
    then differ where the sum is near a tie, which is allowed for one number in a thousand.
    """
    every = patterns(dtype)
    other = every.flatten().roll(12_345).view_as(every)
    gate = torch.linspace(0.01, 0.99, 4096)
    found = ops.gated_residual(every, other, gate, form="lerp")
    want = torch.lerp(every.float(), other.float(), gate[:, None]).to(dtype)
    assert torch.equal(found.isnan(), want.isnan())
    numbers = ~want.isnan()
    differ = (found != want) & numbers
    assert differ.float().mean() < 1e-3
    apart = found.view(torch.int16).int() - want.view(torch.int16).int()
    assert (apart[differ].abs() <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_sums(dtype):
    """Adding in place is torch's sum."""
    every = patterns(dtype)
    other = every.flatten().roll(777).view_as(every)
    rows = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    found = LIBRARY.scatter_add_rows(every, rows, other)
    want = every.clone()
    want[rows] = halves(every[rows].float() + other.float(), dtype)
    same(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", ["x", "branch"])
def test_mixed_dtypes_are_promoted(dtype, narrow):
    """Beside float32, as under autocast: a float32 sum, and each gradient in its input's dtype."""
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (torch.randn(n, 5, generator=generator) for n in (4, 2, 4))
    x, branch = (x.to(dtype), branch) if narrow == "x" else (x, branch.to(dtype))
    slot = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (x, branch, torch.tensor([0.5, 1.0, 0.0, 1.0]))]
    y = ops.gated_residual(*leaves, slot)
    y.backward(grad)
    full = torch.zeros(4, 5).index_copy(0, torch.tensor([3, 0]), branch.detach().float())
    weighted = full * leaves[2].detach()[:, None]
    assert y.dtype == torch.float32 and torch.equal(y, x.float() + weighted)
    assert [t.grad.dtype for t in leaves] == [x.dtype, branch.dtype, torch.float32]
    assert torch.equal(x.grad, grad.to(x.dtype))
    assert torch.equal(branch.grad, torch.stack((grad[3], grad[0] * 0.5)).to(branch.dtype))
