"""Any strides, of inputs, of saved tensors and of incoming gradients; the strides of results."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

LIBRARY = torch.ops.layerprune
KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
SHAPES = [
    (6,),
    (6, 11),
    (6, 9, 4, 5),
    (4, 2, 3, 2, 3),
    (6, 1, 4, 5),
    (6, 3, 1, 1),
    (1, 3, 4, 5),
    (6, 1, 1, 1),
]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def junk(t):
    """What lies between the elements and must not be read."""
    return torch.nan if t.is_floating_point() else 99


def channels_last(t):
    return t.contiguous(memory_format=CHANNELS_LAST.get(t.dim(), torch.contiguous_format))


def embedded(t, make=torch.Tensor.contiguous):
    """In the middle of a larger tensor of NaN, in the second dimension."""
    size = list(t.shape)
    size[1] += 2
    base = make(t.new_full(size, junk(t)))
    base[:, 1:-1] = t
    return base[:, 1:-1]


def batch_sliced(t, make=torch.Tensor.contiguous):
    """Every other row of a tensor whose other rows are NaN."""
    return make(torch.stack((t, torch.full_like(t, junk(t))), 1).flatten(0, 1))[::2]


def strided(t):
    return torch.stack((t, torch.full_like(t, junk(t))), -1)[..., 0]


def offset(t):
    """One element behind an aligned address."""
    base = t.new_empty(t.numel() + 1)
    base[1:] = t.flatten()
    return base[1:].view(t.shape)


def overlapping(t):
    """Every row begins one element behind the one before."""
    return t.flatten().as_strided(t.shape, (1, *t.contiguous().stride()[1:]))


def odd_ones(t):
    """Strides of dimensions of size 1 are of no consequence, whatever they are."""
    strides = [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "strided": strided,
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "embedded": embedded,
    "embedded channels_last": lambda t: embedded(t, channels_last),
    "batch sliced": batch_sliced,
    "batch sliced channels_last": lambda t: batch_sliced(t, channels_last),
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "offset": offset,
    "overlapping": overlapping,
    "odd ones": odd_ones,
    "stride 0 over the batch": lambda t: t[:1].expand_as(t),
    "stride 0 over channels": lambda t: t[:, :1].expand_as(t),
    "stride 0 in the last": lambda t: t[..., :1].expand_as(t),
    "stride 0 throughout": lambda t: t.flatten()[:1].view([1] * t.dim()).expand_as(t),
}
NEEDS_CHANNELS = {"transposed", "embedded", "embedded channels_last", "stride 0 over channels"}


def cases(shapes=SHAPES):
    """(layout, shape) for all layouts that a shape can have."""
    return [
        pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}")
        for name in LAYOUTS
        for shape in shapes
        if len(shape) > 1 or name not in NEEDS_CHANNELS
    ]


def others(name, shape):
    """Six pairs of further layouts; over all names, both of a pair in turn have every layout."""
    names = [n for n in LAYOUTS if len(shape) > 1 or n not in NEEDS_CHANNELS]
    first = names.index(name)
    for i in range(6):
        yield i, names[(first + 3 * i) % len(names)], names[(first + 5 * i + 1) % len(names)]


def tensor(layout, shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def copy(t):
    """The values in float64, densely."""
    return torch.empty(t.shape, dtype=torch.float64).copy_(t)


def gates_and_slots(batch, count):
    """Gates 0, 1 and between; rows without a slot where count < batch, in no order."""
    gate = torch.tensor([0.3, 1.0, 0.0, 0.8, 1.0, 0.6])[:batch]
    if count == batch:
        return gate, None
    slot = torch.full((batch,), -1, dtype=torch.int32)
    slot[: count + 1] = torch.arange(count, -1, -1, dtype=torch.int32) - 1
    return gate, slot.roll(1)


def documented_strides(like, shape):
    """Those of a contiguous or channels_last tensor as ``like`` is one, else contiguous."""
    layout = torch.contiguous_format
    if not like.is_contiguous() and like.dim() in CHANNELS_LAST:
        wanted = CHANNELS_LAST[like.dim()]
        layout = wanted if like.is_contiguous(memory_format=wanted) else layout
    return torch.empty(shape, memory_format=layout).stride()


@pytest.mark.parametrize(("layout", "shape"), cases([(6, 11), (6, 9, 4, 5)]))
def test_low_precision(layout, shape, gated):
    """As below, for float16."""
    check_gated_residual(layout, shape, torch.float16, gated)


@pytest.mark.parametrize(("layout", "shape"), cases())
def test_gated_residual(layout, shape, gated):
    """Values and gradients, all fresh, whatever the strides of x, branch and incoming gradient."""
    check_gated_residual(layout, shape, torch.float64, gated)


def check_gated_residual(layout, shape, dtype, gated):
    """All kinds of sum, with and without slots, beside six pairs of further layouts."""
    for i, of_branch, of_grad in others(layout, shape):
        form, activation = KINDS[i % 3]
        count = shape[0] if i % 2 else max(shape[0] - 2, 0)
        gate, slot = gates_and_slots(shape[0], count)
        x = tensor(layout, shape, 0, dtype).requires_grad_()
        branch = tensor(of_branch, shape, 1, dtype)[:count].requires_grad_()
        gate.requires_grad_()
        asked = torch.tensor([0, 3, 4])[: shape[0] // 2] if i > 2 else None
        y = torch.ops.layerprune.gated_residual(
            x, branch, gate, slot, asked, activation == "relu", form == "lerp"
        )
        plain = (gate.detach(), slot, form, activation)
        low = (x.detach(), branch.detach())
        gated.close(y, gated.sum(*map(copy, low), *plain), gated.sum(*low, *plain))
        grad = tensor(of_grad, shape, 2, dtype)
        before = grad.clone()
        found = torch.autograd.grad(y, (x, branch, gate), grad)
        assert torch.equal(grad, before)
        passed = (form, activation, slot) == ("add", None, None)
        assert not passed or found[0].equal(grad)
        results = [t for t in (x, branch, grad, y, *found[passed:]) if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)
        exact = gated.gradients(*map(copy, (grad, y.detach(), *low)), *plain, asked)
        eager = gated.gradients(grad, y.detach(), *low, *plain, asked)
        gated.close(found[0], exact[0], eager[0])
        gated.close(found[1], exact[1], eager[1])
        torch.testing.assert_close(found[2], exact[2].float(), rtol=1e-5, atol=1e-5)
        assert y.stride() == documented_strides(x, shape)
        like = y if activation == "relu" else grad
        of_x = grad.stride() if passed else documented_strides(like, shape)
        assert found[0].stride() == of_x
        assert found[1].stride() == documented_strides(like, branch.shape)


@pytest.mark.parametrize(("layout", "shape"), cases())
def test_saved_tensors(layout, shape, gated):
    """The backward alone: y and factor may lie differently from the gradient."""
    batch = shape[0]
    gate, _ = gates_and_slots(batch, batch)
    for i, of_y, of_factor in others(layout, shape):
        form, activation = KINDS[i % 3]
        grad, y = tensor(layout, shape, 0), tensor(of_y, shape, 1)
        factor = tensor(of_factor, shape, 2)
        d_x, d_branch, d_gate = LIBRARY.gated_residual_backward(
            grad, y if activation else None, gate, None, factor, None, batch, form == "lerp"
        )
        x = torch.zeros(shape, dtype=torch.float64)
        exact = gated.gradients(copy(grad), copy(y), x, copy(factor), gate, None, form, activation)
        gated.close(d_x, exact[0])
        gated.close(d_branch, exact[1])
        torch.testing.assert_close(d_gate, exact[2].float(), rtol=1e-5, atol=1e-5)
        assert d_x.stride() == documented_strides(y if activation else grad, shape)


@pytest.mark.parametrize(("layout", "shape"), cases())
def test_sampled_gated_residual(layout, shape, gated):
    """Stochastic depth, forward and backward."""
    theta, state = torch.tensor(0.6), torch.tensor([1, 2, 3])
    for i, of_branch, of_grad in others(layout, shape):
        form, activation = KINDS[i % 3]
        x, branch, grad = (
            tensor(name, shape, seed) for seed, name in enumerate((layout, of_branch, of_grad))
        )
        relu, lerp = activation == "relu", form == "lerp"
        y, gates = LIBRARY.sampled_gated_residual(x, branch, theta, state, 5, relu, lerp)
        plain = (gates, None, form, activation)
        gated.close(y, gated.sum(copy(x), copy(branch), *plain))
        assert y.stride() == documented_strides(x, shape)
        found = LIBRARY.sampled_gated_residual_backward(
            grad, y if relu else None, theta, state, 5, lerp
        )
        exact = gated.gradients(*map(copy, (grad, y, x, branch)), *plain)
        for tensor_, want in zip(found, exact, strict=False):
            gated.close(tensor_, want)
            assert tensor_.stride() == documented_strides(y if relu else grad, shape)


@pytest.mark.parametrize(("layout", "shape"), cases())
def test_gather_and_scatter(layout, shape):
    """Rows taken and rows added, into a copy of any layout or in place."""
    rows = torch.tensor([4, 0, 3]) % shape[0] if shape[0] > 4 else torch.tensor([0])
    x = tensor(layout, shape, 0)
    taken = LIBRARY.gather_rows(x, rows)
    assert torch.equal(taken, copy(x)[rows])
    assert taken.stride() == documented_strides(x, taken.shape)
    for _, of_source, _ in others(layout, shape):
        source = tensor(of_source, shape, 1)[: rows.numel()]
        want = copy(x)
        want[rows] += copy(source)
        added = LIBRARY.scatter_add_rows(x, rows, source)
        assert torch.equal(added, want)
        assert added.stride() == documented_strides(x, shape)
        for make in (torch.Tensor.contiguous, channels_last):
            out = make(copy(x))
            LIBRARY.scatter_add_rows_(out, rows, source)
            assert torch.equal(out, want)


@pytest.mark.parametrize(("layout", "shape"), cases())
@pytest.mark.parametrize("lerp", [False, True])
def test_gate_factor(layout, shape, lerp):
    """What a gate multiplies: all rows of the branch or those asked for, with and without slots."""
    batch = shape[0]
    for i, of_branch, _ in others(layout, shape):
        count = batch if i % 2 else max(batch - 2, 0)
        _, slot = gates_and_slots(batch, count)
        x, branch = tensor(layout, shape, 0), tensor(of_branch, shape, 1)[:count]
        place = list(range(batch)) if slot is None else slot.tolist()
        for asked in (None, list(range(0, batch, 2))):
            want = torch.zeros(count if asked is None else len(asked), *shape[1:]).double()
            for row in range(batch) if asked is None else asked:
                if place[row] >= 0:
                    to = place[row] if asked is None else asked.index(row)
                    want[to] = copy(branch)[place[row]] - (copy(x)[row] if lerp else 0)
            given = None if asked is None else torch.tensor(asked)
            found = LIBRARY.gate_factor(x, branch, slot, given, lerp)
            assert torch.equal(found, want)
            assert found.stride() == documented_strides(x if lerp else branch, want.shape)


def every_call(layout, shape):
    """All operators with outputs on a layout, with some rows, all and none of them."""
    batch = shape[0]
    count = max(batch - 2, 0)
    first, second = tensor(layout, shape, 0), tensor("contiguous", shape, 1)
    gate, slot = gates_and_slots(batch, count)
    rows, none = torch.arange(0, batch, 2), torch.zeros(0, dtype=torch.int64)
    theta, state = torch.tensor(0.5), torch.tensor([0, 0, 0])
    for x, other in ((first, second), (second, first)):
        yield LIBRARY.gated_residual, (x, other[:count], gate, slot, rows, True, False)
        for y, slots, taken in ((None, -torch.ones_like(slot), 0), (other, slot, count)):
            some = (gate, slots, None, None, taken, False)
            yield LIBRARY.gated_residual_backward, (x, y, *some)
        yield LIBRARY.sampled_gated_residual_backward, (x, other, theta, state, 0, False)
        for lerp, asked in ((False, rows), (False, none), (True, None), (True, none)):
            yield LIBRARY.gate_factor, (x, other[:count], slot, asked, lerp)
    yield LIBRARY.sampled_gated_residual, (first, second, theta, state, 0, False, False)
    yield LIBRARY.sampled_gated_residual_backward, (first, None, theta, state, 0, True)
    yield LIBRARY.gather_rows, (first, rows)
    yield LIBRARY.gather_rows, (first, none)
    yield LIBRARY.scatter_add_rows, (first, rows, second[: rows.numel()])


@pytest.mark.parametrize(("layout", "shape"), cases())
def test_fakes_predict_the_results(layout, shape):
    """Shape, strides and dtype of every result are those of the fake implementation."""
    mode = FakeTensorMode()
    for operator, arguments in every_call(layout, shape):
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with mode:
            fake = operator(*fakes)
        found = operator(*arguments)
        found, fake = ((r,) if isinstance(r, torch.Tensor) else r for r in (found, fake))
        for a, b in zip(found, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), operator
