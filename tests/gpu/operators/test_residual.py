"""The gated residual sum and its gradients, in every dtype, layout, form and choice of rows."""

import pytest
import torch

from layerprune.ops import masked, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMS = [(False, False), (True, False), (False, True)]  # relu, lerp
B, K = 6, 4
# The last row of the first is not of whole 16 bytes; of the second every one is.
SHAPES = [(3, 2, 5), (4, 4, 4)]
LONG = [9001, 16384]  # several segments
SLOTS = [None, [2, -1, 0, 3, -1, 1], [-1, -1, 1, -1, -1, -1]]
ASKED = [None, torch.tensor([4, 0, 2]), torch.zeros(0, dtype=torch.int64)]


def contiguous(tensor):
    return tensor.contiguous()


def channels_last(tensor):
    """Where there are channels; elsewhere the tensor."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(tensor):
    """The same numbers, every second one of a larger tensor."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def sliced(tensor):
    """Rows that are dense, with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 1)[:, 0]


def shifted(tensor):
    """Off the boundaries of 16 bytes."""
    memory = torch.cat((tensor.new_full((1,), torch.nan), tensor.flatten()))
    return memory[1:].view(tensor.shape)


LAYOUTS = [contiguous, channels_last, strided, sliced, shifted]


def tensors(shape, dtype, layout, slots):
    """Input, branch, gradient, gate and slot; gates of 0, of 1 and between them."""
    generator = torch.Generator().manual_seed(len(shape))
    count = B if slots is None else K
    x, branch, grad = (
        layout(torch.randn(n, *shape, generator=generator).to(dtype)) for n in (B, count, B)
    )
    gate = torch.tensor([0.0, 1.0, 0.25, 0.75, 1.0, 0.5])
    return x, branch, grad, gate, None if slots is None else torch.tensor(slots, dtype=torch.int32)


def exact(tensor):
    return None if tensor is None else tensor.double()


def check(implementation, close, x, branch, grad, gate, slot, relu, lerp, askings):
    """Forward, what is kept of the branch, and backward."""
    eager = reference.gated_residual(x, branch, gate, slot, relu, lerp)
    want = reference.gated_residual(x.double(), branch.double(), gate, slot, relu, lerp)
    y = implementation("gated_residual", x, branch, gate, slot, None, relu, lerp)
    close(y, eager, want)
    kept = eager if relu else None
    if relu:
        check_mask(implementation, x, branch, grad, gate, slot, y)
    for asked in askings:
        factor = reference.gate_factor(x, branch, slot, asked, lerp)
        want = reference.gate_factor(x.double(), branch.double(), slot, asked, lerp)
        close(implementation("gate_factor", x, branch, slot, asked, lerp), factor, want)
        rest = (asked, branch.shape[0], lerp)
        arguments = (grad, kept, gate, slot, factor, *rest)
        found = implementation("gated_residual_backward", *arguments)
        wanted = reference.gated_residual_backward(
            exact(grad), exact(kept), gate, slot, exact(factor), *rest
        )
        given = reference.gated_residual_backward(*arguments)
        for tensor, rough, want in zip(found, given, wanted, strict=True):
            close(tensor, rough, want)
        if not implementation.slow:
            again = implementation("gated_residual_backward", *arguments)
            assert all(map(torch.equal, found, again))


def check_mask(implementation, x, branch, grad, gate, slot, y):
    """With a bit for every element in place of y: the same numbers, bit for bit."""
    layout = reference.row_format(x)
    found, mask = implementation("gated_relu", x, branch, gate, slot, None)
    assert torch.equal(found, y) and found.stride() == y.stride()
    assert torch.equal(mask, masked.pack(~(reference.flat_rows(y, layout) <= 0)))
    factor = reference.gate_factor(x, branch, slot, None, False)
    rest = (gate, slot, factor, None, branch.shape[0])
    channels_last = layout is not torch.contiguous_format
    by_mask = implementation("gated_relu_backward", grad, mask, channels_last, *rest)
    by_y = implementation("gated_residual_backward", grad, y, *rest, False)
    for one, other in zip(by_mask, by_y, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize(("relu", "lerp"), FORMS, ids=("add", "relu", "lerp"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(implementation, close, dtype, layout, relu, lerp):
    # A slow one takes a choice of rows in turn, which meets every dtype, layout and form.
    turn = DTYPES.index(dtype) + LAYOUTS.index(layout) + FORMS.index((relu, lerp))
    for shape in SHAPES[:1] if implementation.slow else SHAPES:
        for slots in [SLOTS[turn % len(SLOTS)]] if implementation.slow else SLOTS:
            arguments = tensors(shape, dtype, layout, slots)
            askings = ASKED[:2] if implementation.slow else ASKED
            check(implementation, close, *arguments, relu, lerp, askings)


@pytest.mark.parametrize(("relu", "lerp"), FORMS, ids=("add", "relu", "lerp"))
@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_segments(implementation, close, dtype, size, relu, lerp):
    """One gate's gradient is a sum of sums."""
    size //= 4 if implementation.slow else 1  # still several of Triton's
    arguments = tensors((size,), dtype, contiguous, SLOTS[1])
    check(implementation, close, *arguments, relu, lerp, ASKED[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_for_the_whole_gradient(implementation, close, dtype):
    """As from a sum: all strides are 0."""
    x, branch, _, gate, slot = tensors(SHAPES[1], dtype, contiguous, SLOTS[1])
    grad = torch.tensor(0.75, dtype=dtype).expand(x.shape)
    check(implementation, close, x, branch, grad, gate, slot, True, False, ASKED[:2])
    check(
        implementation, close, x, branch, grad[:1].expand(x.shape), gate, slot, False, True, ASKED
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_of_x(implementation, dtype):
    """Where the incoming one is passed on: nothing in its place, the others bit for bit."""
    for slots, size in ((None, 20), (SLOTS[1], 9001)):
        x, branch, grad, gate, slot = tensors((size,), dtype, contiguous, slots)
        arguments = (grad, None, gate, slot, branch, None, branch.shape[0], False)
        expected = implementation("gated_residual_backward", *arguments, True)
        found = implementation("gated_residual_backward", *arguments, False)
        assert found[0].shape == (0, size)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def test_no_gate_gradient(implementation):
    """Nothing of the branch is needed then."""
    x, branch, grad, gate, slot = tensors((3,), torch.float32, sliced, SLOTS[1])
    arguments = (grad, None, gate, slot, None, None, K, False)
    expected = reference.gated_residual_backward(*arguments)
    found = implementation("gated_residual_backward", *arguments)
    for tensor, want in zip(found, expected, strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("lerp", [False, True])
def test_many_rows(implementation, close, lerp):
    """More than a block has, in another order than the branch's; some have no slot."""
    generator = torch.Generator().manual_seed(1)
    batch, running, asked = (101, 60, 30) if implementation.slow else (3001, 1900, 700)
    slot = torch.full((batch,), -1, dtype=torch.int32)
    rows = torch.randperm(batch, generator=generator)[:running]
    slot[rows] = torch.arange(running, dtype=torch.int32)
    x, branch, grad = (torch.randn(n, 8, generator=generator) for n in (batch, running, batch))
    gate = torch.rand(batch, generator=generator)
    askings = [None, torch.randperm(batch, generator=generator)[:asked]]
    check(implementation, close, x, branch, grad, gate, slot, not lerp, lerp, askings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_pass(implementation, dtype):
    """ReLU keeps what is not a number; a closed gate does not read the branch."""
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, -1.0] * 4] * 2, dtype=dtype)
    branch = torch.full_like(x, torch.nan)
    y = implementation("gated_residual", x, branch, torch.zeros(2), None, None, True, False)
    torch.testing.assert_close(y, x.relu(), equal_nan=True, rtol=0, atol=0)
    ends = implementation("gated_residual", branch, x, torch.ones(2), None, None, False, True)
    torch.testing.assert_close(ends, x, equal_nan=True, rtol=0, atol=0)
    gate, grad = torch.tensor([0.0, 1.0]), torch.ones_like(x)
    d_x, d_branch, _ = implementation(
        "gated_residual_backward", grad, y, gate, None, None, None, 2, False
    )
    passed = torch.where(y <= 0, 0, grad)
    assert torch.equal(d_x, passed)
    assert torch.equal(d_branch, passed * gate[:, None].to(dtype))


def test_absurd_slots_harm_nothing(implementation):
    """Out of range is absent: on a device nobody has looked."""
    x = torch.ones(3, 2)
    slot = torch.tensor([5, -9, 0], dtype=torch.int32)
    y = implementation("gated_residual", x, x[:1], torch.ones(3), slot, None, False, False)
    assert y.tolist() == [[1, 1], [1, 1], [2, 2]]
    asked = torch.tensor([9, -4, 2])
    factor = implementation("gate_factor", x, x[:1], slot, asked, False)
    assert factor.tolist() == [[0, 0], [0, 0], [1, 1]]
    d_x, d_branch, d_gate = implementation(
        "gated_residual_backward", 3 * x, None, torch.ones(3), slot, factor, asked, 1, False
    )
    assert torch.equal(d_x, 3 * x)
    assert d_branch.tolist() == [[3, 3]] and d_gate.tolist() == [0, 0, 6]


def test_empty(implementation):
    for count, size in ((0, 3), (2, 0)):
        x, gate = torch.zeros(count, size), torch.ones(count)
        y = implementation("gated_residual", x, x, gate, None, None, True, False)
        assert y.shape == x.shape
        found = implementation("gated_residual_backward", x, x, gate, None, x, None, count, False)
        assert [f.shape for f in found] == [x.shape, x.shape, gate.shape]
        assert not found[2].any()
    nobody = torch.full((2,), -1, dtype=torch.int32)
    x, none = torch.ones(2, 3), torch.zeros(0, 3)
    y = implementation("gated_residual", x, none, torch.zeros(2), nobody, None, False, False)
    assert torch.equal(y, x)
    found = implementation(
        "gated_residual_backward", x, None, torch.ones(2), nobody, none, None, 0, False
    )
    assert torch.equal(found[0], x) and found[1].shape == (0, 3) and not found[2].any()
