"""The sum with ReLU that keeps bits: the same numbers as the one that keeps its result."""

import pytest
import torch

from layerprune import ops
from layerprune.ops import functional, masked, registration

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(1, 1, 1), (3, 1, 5), (8, 2, 4), (5, 7, 3)]
SLOTS = [None, [2, -1, 0, 3, -1, 1]]
ASKED = [None, [], [3, 0, 1]]
B = 6


def _tensors(shape, dtype, layout, slots):
    generator = torch.Generator().manual_seed(0)
    count = B if slots is None else 4
    x, branch, grad = (
        torch.randn(n, *shape, generator=generator).to(dtype).contiguous(memory_format=layout)
        for n in (B, count, B)
    )
    gate = torch.tensor([0.0, 1.0, 0.25, 0.75, 1.0, 0.5])
    slot = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    return x, branch, grad, gate, slot


def _gradients(y, grad, inputs):
    return torch.autograd.grad(y, inputs, grad)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_numbers(dtype, layout, shape, slots, asked):
    """y, and all gradients, within a rounding: kernels of one family may sum otherwise."""
    x, branch, grad, gate, slot = _tensors(shape, dtype, layout, slots)
    # Infinite, zero and no numbers; the incoming gradient in the other layout.
    x[0, 0, 0, 0], x[1, -1, 0, 0], x[4, 0, 0, -1] = torch.nan, -torch.inf, 0.0
    grad = grad.contiguous(memory_format=LAYOUTS[layout is LAYOUTS[0]])
    rows = None if asked is None else torch.tensor(asked, dtype=torch.int64)
    inputs = tuple(t.requires_grad_() for t in (x, branch, gate))
    y, mask = masked.gated_relu(x, branch, gate, slot, rows)
    expected = registration.gated_residual(x, branch, gate, slot, rows, True, False)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert mask.dtype == torch.uint8 and not mask.requires_grad
    assert y.stride() == expected.stride()
    for found, want in zip(
        _gradients(y, grad, inputs), _gradients(expected, grad, inputs), strict=True
    ):
        torch.testing.assert_close(found, want, equal_nan=True)
        assert found.stride() == want.stride()


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 64, 1001])
def test_bits(elements):
    """Element i is bit i % 8 of byte i // 8; what is beyond the end is 0."""
    passed = torch.rand(3, elements, generator=torch.Generator().manual_seed(elements)) < 0.5
    mask = masked.pack(passed)
    assert mask.shape == (3, -(-elements // 8))
    for row, packed in zip(passed.tolist(), mask.tolist(), strict=True):
        number = sum(bit << place for place, bit in enumerate(row))
        assert bytes(packed) == number.to_bytes(len(packed), "little")
    assert masked.unpack(mask, elements).equal(passed)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_and_fakes(layout, slots):
    x, branch, grad, gate, slot = _tensors((3, 2, 5), torch.float32, layout, slots)
    rows = torch.tensor([1, 4])
    inputs = tuple(t.requires_grad_() for t in (x, branch, gate))
    torch.library.opcheck(masked.gated_relu, (*inputs, slot, rows))
    _, mask = masked.gated_relu(x, branch, gate, slot, rows)
    channels_last = layout is torch.channels_last
    factor = torch.randn(2, 3, 2, 5)
    torch.library.opcheck(
        masked.gated_relu_backward,
        (grad, mask, channels_last, gate.detach(), slot, factor, rows, branch.shape[0]),
    )


@pytest.fixture
def everywhere(monkeypatch):
    """The public function takes this form on the CPU as well, where it has no kernel."""
    monkeypatch.setattr(functional, "MASKED_DEVICES", frozenset({"cpu", "cuda"}))


def test_nothing_of_activation_size_is_kept(everywhere):
    """Without a gate's gradient: bits, gate and slot."""
    x, branch, _, gate, slot = _tensors((8, 4, 4), torch.float32, LAYOUTS[0], SLOTS[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gated_residual(x.requires_grad_(), branch, gate, slot, "relu")
    assert sum(t.nbytes for t in kept) == B * 128 // 8 + gate.nbytes + slot.nbytes


def test_without_a_gradient_no_bits_are_made(everywhere, monkeypatch):
    x, branch, _, gate, _ = _tensors((3, 2, 2), torch.float32, LAYOUTS[0], None)
    monkeypatch.setattr(masked, "gated_relu", None)
    ops.gated_residual(x, branch, gate, None, "relu")
    with torch.no_grad():
        ops.gated_residual(x.requires_grad_(), branch, gate, None, "relu")


def test_no_second_derivative(everywhere):
    x, branch, grad, gate, _ = _tensors((3, 2, 2), torch.float64, LAYOUTS[0], None)
    y = ops.gated_residual(x.requires_grad_(), branch, gate, None, "relu")
    (d_x,) = torch.autograd.grad(y, x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_x.sum().backward()


@pytest.mark.slow
def test_it_compiles_with_inductor(everywhere):
    """Whole, with the numbers of the eager run."""

    def function(x, branch, gate, slot, rows):
        return ops.gated_residual(x * 2, branch, gate, slot, "relu", gate_grad_rows=rows) + 1

    x, branch, grad, gate, slot = _tensors((3, 2, 5), torch.float32, LAYOUTS[0], SLOTS[1])
    inputs = tuple(t.requires_grad_() for t in (x, branch, gate))
    rows = torch.tensor([0, 3])
    compiled = torch.compile(function, fullgraph=True)
    results = []
    for call in (function, compiled):
        y = call(*inputs, slot, rows)
        results.append((y, *_gradients(y, grad, inputs)))
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)
