"""The gated residual sum: values and gradients against an independent expression."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprune import ops

KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
FORMATS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


def expression(x, branch, gate, slot, form, activation):
    """The sum as one would write it: the branch scattered over all rows, then one formula."""
    if slot is None:
        slot = torch.arange(x.shape[0])
    rows = [b for b in range(x.shape[0]) if slot[b] >= 0 and gate[b] != 0]
    weight = gate.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    pieces = []
    for b in range(x.shape[0]):
        piece = x[b]
        if b in rows:
            other = branch[slot[b]]
            other = other - piece if form == "lerp" else other
            piece = piece + weight[b] * other
        pieces.append(piece)
    y = torch.stack(pieces) if pieces else x + 0
    return y.relu() if activation == "relu" else y


def case(batch, count, shape=(3, 2, 4), dtype=torch.float64, seed=0, gates="mixed"):
    """x, branch, gate and slot with `count` running rows in random order; leaves with grad."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    branch = torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    slot = torch.full((batch,), -1, dtype=torch.int32)
    owners = torch.randperm(batch, generator=generator)[:count]
    slot[owners] = torch.arange(count, dtype=torch.int32)
    gate = torch.rand(batch, generator=generator)
    kinds = torch.randint(0, 3, (batch,), generator=generator)
    gate = {
        "mixed": torch.where(kinds == 0, 0.0, torch.where(kinds == 1, 1.0, gate)),
        "ones": torch.ones(batch),
        "slotted": (slot >= 0).float(),
    }[gates]
    return x, branch, gate, slot


def leaves(*tensors):
    """Fresh leaves that require a gradient; strides stay."""
    return [t.detach().requires_grad_() for t in tensors]


def gradients(y, inputs, grad):
    """Gradients, zeros where there is no path."""
    return torch.autograd.grad(y, inputs, grad, allow_unused=True, materialize_grads=True)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 6),
    count=st.integers(0, 6),
    shape=st.lists(st.integers(0, 3), max_size=4),
    kind=st.sampled_from(KINDS),
    gates=st.sampled_from(["mixed", "ones", "slotted"]),
    probes=st.one_of(st.none(), st.integers(0, 6)),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_over_shapes(batch, count, shape, kind, gates, probes, seed):
    """float64: value and all gradients, any shape, any number of running rows and probes."""
    form, activation = kind
    x, branch, gate, slot = case(batch, min(count, batch), tuple(shape), seed=seed, gates=gates)
    if seed % 3 == 0:
        slot[::2] = -1  # rows of the branch that nobody reads
    rows = None if probes is None else torch.randperm(batch)[:probes]
    x, branch, gate = leaves(x, branch, gate)
    y = ops.gated_residual(x, branch, gate, slot, activation, form, rows)
    expected = expression(x, branch, gate, slot, form, activation)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    d_x, d_branch, d_gate = gradients(y, (x, branch, gate), grad)
    want_x, want_branch = gradients(expected, (x, branch), grad)
    torch.testing.assert_close(d_x, want_x)
    torch.testing.assert_close(d_branch, want_branch)
    passed = grad * (y > 0) if activation == "relu" else grad
    for b in range(batch):
        want = torch.tensor(0.0)
        if slot[b] >= 0 and (rows is None or b in rows):
            factor = branch[slot[b]] - x[b] if form == "lerp" else branch[slot[b]]
            want = (passed[b] * factor).sum()
        assert d_gate[b].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("slotted", [False, True])
def test_gradcheck(form, activation, slotted):
    """Numerical derivatives in float64 for x and branch, by central differences for the gate."""
    x, branch, gate, slot = case(5, 3 if slotted else 5, (2, 3), seed=4)
    slot = slot if slotted else None
    x, branch = leaves(x, branch)

    def run(x, branch, gate=gate, rows=None):
        return ops.gated_residual(x, branch, gate, slot, activation, form, rows)

    assert torch.autograd.gradcheck(run, (x, branch))
    # Away from gate 0, where the branch is not read; the sum is linear in the gate but for ReLU.
    gate = gate.clamp(0.25, 0.75)
    weights = torch.randn(5, 2, 3, dtype=torch.float64)
    for rows in (None, torch.tensor([3, 0]), torch.tensor([], dtype=torch.int64)):
        (leaf,) = leaves(gate)
        (found,) = torch.autograd.grad((run(x, branch, leaf, rows) * weights).sum(), leaf)
        step = 2.0**-12
        for b in range(5):
            ends = []
            for sign in (-1, 1):
                moved = gate.clone()
                moved[b] += sign * step
                ends.append((run(x, branch, moved, rows) * weights).sum().item())
            want = (ends[1] - ends[0]) / (2 * step)
            asked = rows is None or b in rows
            assert found[b].item() == pytest.approx(want if asked else 0.0, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_low_precision(form, activation, dtype, layout):
    """Errors are at most twice those of the eager expression in the same dtype, plus atol."""
    x, branch, gate, slot = case(16, 9, (8, 5, 5), dtype=dtype, seed=1)
    x, branch = FORMATS[layout](x), FORMATS[layout](branch)
    grad = FORMATS[layout](torch.randn(16, 8, 5, 5).to(dtype))
    results = []
    for wide, function in (
        (torch.float64, expression),
        (dtype, expression),
        (dtype, lambda *a: ops.gated_residual(*a[:4], form=a[4], activation=a[5])),
    ):
        given_x, given_branch, given_gate = leaves(x.to(wide), branch.to(wide), gate)
        y = function(given_x, given_branch, given_gate, slot, form, activation)
        inputs = (given_x, given_branch)
        results.append([y, *gradients(y, inputs, grad.to(wide))])
    atol = torch.finfo(dtype).eps / 4
    for exact, eager, found in zip(*results, strict=True):
        assert found.dtype == dtype
        bound = 2 * (eager.double() - exact).abs().max() + atol
        assert (found.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_gradient_accumulates_in_float32(dtype):
    """Summing 20,000 products loses nothing that float32 would keep."""
    branch = torch.rand(2, 20_000).to(dtype)
    gate = torch.ones(2, requires_grad=True)
    ops.gated_residual(torch.zeros_like(branch), branch, gate).backward(torch.ones_like(branch))
    torch.testing.assert_close(gate.grad, branch.double().sum(1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("probed", [False, True])
def test_exact_at_the_ends(dtype, probed):
    """Gate 1 is exactly x + branch, or exactly the branch; gate 0 exactly x; beside a probe too."""
    x, branch, _, _ = case(64, 64, (7,), dtype=dtype)
    gate = torch.arange(64).remainder(2).float()
    slot = None
    if probed:
        gate[0] = 0.3
    on = gate == 1
    for some in (slot, torch.arange(64, dtype=torch.int32)):
        y = ops.gated_residual(x, branch, gate, some)
        assert torch.equal(y[on], (x + branch)[on]) and torch.equal(y[gate == 0], x[gate == 0])
        y = ops.gated_residual(x, branch, gate, some, form="lerp")
        assert torch.equal(y[on], branch[on]) and torch.equal(y[gate == 0], x[gate == 0])
    ones = torch.ones(64)
    assert torch.equal(ops.gated_residual(x, branch, ones, None, "relu"), (x + branch).relu())
    assert torch.equal(ops.gated_residual(x, branch, ones, form="lerp"), branch)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_the_ends_of_the_interpolation_read_one_side(bad):
    """At gate 1 the row is the branch, whatever x holds, beside a probe too; at 0 it is x."""
    x, branch = torch.ones(4, 3), torch.full((4, 3), -3e38)
    x[:2] = bad
    gate = torch.tensor([1.0, 0.0, 0.5, 1.0])
    y = ops.gated_residual(x, branch, gate, form="lerp")
    assert torch.equal(y[[0, 3]], branch[[0, 3]])
    torch.testing.assert_close(y[1], x[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_closed_gate_does_not_read_the_branch(form, activation, bad):
    """NaN and infinity in the branch of a gate-0 row, or without a slot, touch nothing."""
    x, branch, _, _ = case(6, 4, dtype=torch.float32)
    slot = torch.tensor([3, -1, 0, -1, 1, 2], dtype=torch.int32)
    gate = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.0])
    branch[3] = bad
    branch[2] = bad
    x, branch, gate = leaves(x, branch, gate)
    y = ops.gated_residual(x, branch, gate, slot, activation, form, torch.tensor([1, 2]))
    y.backward(torch.ones_like(y))
    for tensor in (y, x.grad, branch.grad, gate.grad):
        assert tensor.isfinite().all()
    closed = [0, 1, 3, 5]
    assert torch.equal(y[closed], x[closed].relu() if activation else x[closed])
    assert branch.grad[2:].eq(0).all()
    assert gate.grad[[0, 1, 3, 4, 5]].eq(0).all() and gate.grad[2] != 0


def test_a_closed_gate_still_has_a_gradient():
    """The derivative at gate 0 is the row's sum of dy * branch: what `path` needs at theta 0."""
    x, branch, _, _ = case(4, 4, dtype=torch.float32)
    gate = torch.zeros(4, requires_grad=True)
    grad = torch.randn(branch.shape)
    ops.gated_residual(x, branch, gate).backward(grad)
    torch.testing.assert_close(gate.grad, (grad * branch).flatten(1).sum(1))
    gate.grad = None
    ops.gated_residual(x, branch, gate, form="lerp").backward(grad)
    torch.testing.assert_close(gate.grad, (grad * (branch - x)).flatten(1).sum(1))


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize(
    ("gate_needs_grad", "rows", "kept"),
    [(False, None, 0), (True, [4], 1), (True, [4, 0], 2), (True, [], 0), (True, None, 4)],
)
def test_what_is_saved(form, activation, gate_needs_grad, rows, kept):
    """Saved for backward: y for ReLU only, and of the branch the asked rows only."""
    x, branch, gate, slot = case(6, 4, (50,), dtype=torch.float32)
    x, branch = leaves(x, branch)
    gate.requires_grad_(gate_needs_grad)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.gated_residual(x, branch, gate, slot, activation, form, rows)
    assert sum(t.shape[0] for t in saved if t.dim() == 2) == kept + (6 if activation else 0)
    assert all(t.numel() <= 6 for t in saved if t.dim() == 1)


def test_second_derivative_is_refused():
    """create_graph gives the first derivative, going on raises."""
    x, branch, gate, slot = case(4, 3)
    x, branch, gate = leaves(x, branch, gate)
    y = ops.gated_residual(x, branch, gate, slot, "relu")
    (d_gate,) = torch.autograd.grad(y.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(d_gate.sum(), x)


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("slotted", [False, True])
def test_opcheck(form, activation, slotted):
    """Schema, fakes, autograd registration and dynamic shapes of forward and backward."""
    x, branch, gate, slot = case(6, 4 if slotted else 6, dtype=torch.float32)
    slot = slot if slotted else None
    rows = torch.tensor([2, 4]) if slotted else None
    x, branch, gate = leaves(FORMATS["channels_last"](x), branch, gate)
    relu, lerp = activation == "relu", form == "lerp"
    library = torch.ops.layerprune
    torch.library.opcheck(library.gated_residual.default, (x, branch, gate, slot, rows, relu, lerp))
    x, branch, gate = x.detach(), branch.detach(), gate.detach()
    y = library.gated_residual(x, branch, gate, slot, rows, relu, lerp) if relu else None
    kept = branch[:2] if slotted else branch
    torch.library.opcheck(
        library.gated_residual_backward.default,
        (torch.randn(x.shape), y, gate, slot, kept, rows, branch.shape[0], lerp),
    )


X, BRANCH, GATE = torch.zeros(4, 3), torch.zeros(2, 3), torch.ones(4)
SLOT = torch.tensor([0, -1, 1, -1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": GATE.double()}, r"gate must be torch.float32 of shape \[4\], got torch.float64"),
        ({"gate": torch.ones(4, 1)}, r"gate must be .* got torch.float32 of shape \[4, 1\]"),
        ({"gate": torch.ones(4, device="meta")}, "gate is on meta"),
        ({"slot": SLOT.long()}, "slot must be torch.int32"),
        ({"slot": SLOT[:3]}, r"slot must be .* \[4\]"),
        ({"slot": None}, "give slot"),
        ({"branch": torch.zeros(5, 3)}, "more than the 4 of x"),
        ({"branch": torch.zeros(2, 4)}, "must agree in all dimensions but the first"),
        ({"branch": torch.zeros(2, 3, device="meta")}, "branch is on meta"),
        ({"branch": torch.zeros(2, 3, dtype=torch.int64)}, "must be floating point"),
        ({"x": torch.tensor(1.0)}, "must agree"),
        ({"activation": "gelu"}, "activation must be None or 'relu'"),
        ({"form": "mul"}, "form must be one of"),
        ({"form": "lerp", "activation": "relu"}, "takes no activation"),
        ({"gate_grad_rows": torch.tensor([0], dtype=torch.int32)}, "gate_grad_rows must be"),
        ({"gate_grad_rows": torch.tensor([[0]])}, "gate_grad_rows must be"),
    ],
)
def test_errors(change, message):
    """Each bad argument is named, with what was got."""
    arguments = {"x": X, "branch": BRANCH, "gate": GATE, "slot": SLOT}
    with pytest.raises(ValueError, match=message):
        ops.gated_residual(**(arguments | change))
