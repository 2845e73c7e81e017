"""Every element of every result is written, whatever the memory held before.

Under deterministic algorithms torch fills the memory of a new tensor with NaN, or the greatest
integer: what is not written shows.
"""

import pytest
import torch

from layerprune import ops

LIBRARY = torch.ops.layerprune
KINDS = [("add", None), ("add", "relu"), ("lerp", None)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPE = (6, 3, 5, 7)

# Five rows of a branch of which nobody reads row 1; no row with a slot; no branch at all.
SLOTS = {
    "one unread": ([4, -1, 0, 2, -1, 3], 5),
    "none of five": ([-1] * 6, 5),
    "no branch": ([-1] * 6, 0),
    "all": (None, 6),
}


def case(name, layout, dtype):
    slot, count = SLOTS[name]
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (
        torch.randn(n, *SHAPE[1:], generator=generator).to(dtype).contiguous(memory_format=layout)
        for n in (6, count, 6)
    )
    gate = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.0, 0.9])
    return x, branch, grad, gate, None if slot is None else torch.tensor(slot, dtype=torch.int32)


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_gated_residual(form, activation, name, layout, dtype, gated):
    """Values and gradients, with gates' gradients for all rows, some or none."""
    x, branch, grad, gate, slot = case(name, layout, dtype)
    plain = (gate, slot, form, activation)
    for asked in (None, torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)):
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
        y = ops.gated_residual(*leaves, slot, activation, form, asked)
        found = torch.autograd.grad(y, leaves, grad)
        exact = gated.sum(x.double(), branch.double(), *plain)
        gated.close(y, exact, gated.sum(x, branch, *plain))
        wide = [t.double() for t in (grad, y.detach(), x, branch)]
        exact = gated.gradients(*wide, *plain, asked)
        eager = gated.gradients(grad, y.detach(), x, branch, *plain, asked)
        gated.close(found[0], exact[0], eager[0])
        gated.close(found[1], exact[1], eager[1])
        torch.testing.assert_close(found[2], exact[2].float(), rtol=1e-4, atol=1e-4)


def factor(x, branch, slot, asked, lerp):
    """What a gate multiplies, one row after the other."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    place = list(range(6)) if slot is None else slot.tolist()
    count = branch.shape[0] if asked is None else len(asked)
    result = torch.zeros(count, *SHAPE[1:], dtype=wide if lerp else x.dtype)
    for row in range(6) if asked is None else asked:
        if place[row] >= 0:
            value = branch[place[row]].to(result.dtype)
            value = value - x[row].to(result.dtype) if lerp else value
            result[place[row] if asked is None else asked.index(row)] = value
    return result


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lerp", "asked"), [(False, [1, 2, 4]), (False, []), (True, [1, 2, 4]), (True, None)]
)
@pytest.mark.usefixtures("poison")
def test_gate_factor(name, layout, dtype, lerp, asked):
    """Zeros for rows without a slot and for rows of the branch that nobody reads."""
    x, branch, _, _, slot = case(name, layout, dtype)
    rows = None if asked is None else torch.tensor(asked, dtype=torch.int64)
    found = LIBRARY.gate_factor(x, branch, slot, rows, lerp)
    want = factor(x, branch, slot, asked, lerp)
    assert found.dtype == want.dtype and torch.equal(found, want)


@pytest.mark.parametrize("name", SLOTS)
def test_gate_factor_of_the_whole_branch(name):
    """With ``add`` and for all rows it is the branch, again with zeros where nobody reads it."""
    x, branch, _, _, slot = case(name, torch.contiguous_format, torch.float32)
    found = LIBRARY.gate_factor(x, branch, slot, None, False)
    assert torch.equal(found, factor(x, branch, slot, None, False))


@pytest.mark.parametrize("rows", [[], [4], [5, 0, 3], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_gather_and_scatter(rows, layout, dtype):
    """Rows taken and rows added; the gradient of the rows alone is zeros elsewhere."""
    x, source, _, _, _ = case("all", layout, dtype)
    rows = torch.tensor(rows, dtype=torch.int64)
    source = source[: len(rows)]
    assert torch.equal(LIBRARY.gather_rows(x, rows), x[rows])
    want = x.clone()
    want[rows] += source
    assert torch.equal(LIBRARY.scatter_add_rows(x, rows, source), want)
    x = x.detach().requires_grad_()
    taken, _ = ops.take_rows(x, rows)
    (found,) = torch.autograd.grad(taken, x, source)
    assert torch.equal(found, torch.zeros_like(x).index_copy(0, rows, source))


@pytest.mark.parametrize(("form", "activation"), KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_sampled_gated_residual(form, activation, theta, layout, gated):
    """Values, gates and gradients."""
    x, branch, grad, _, _ = case("all", layout, torch.float64)
    leaves = [t.detach().requires_grad_() for t in (x, branch)]
    state = torch.tensor([1, 2, 3])
    y, gates = ops.sampled_gated_residual(*leaves, torch.tensor(theta), state, 0, activation, form)
    plain = (gates, None, form, activation)
    gated.close(y, gated.sum(x, branch, *plain))
    exact = gated.gradients(grad, y.detach(), x, branch, *plain)
    for found, want in zip(torch.autograd.grad(y, leaves, grad), exact, strict=False):
        gated.close(found, want)


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
@pytest.mark.parametrize("batch", [0, 1, 50])
@pytest.mark.usefixtures("poison")
def test_draw(scheme, batch, plain):
    """Lists are filled up with -1, gates of closed rows are 0."""
    theta, rate = torch.tensor([0.0, 0.5, 1.0, 0.3]), torch.tensor([0.0, 0.2, 0.0, 1.0])
    options = {"min_rows": 0, "row_multiple": 3, "scheme": scheme}
    drawn = ops.sample_gates(theta, batch, torch.tensor([1, 2, 3]), rate, **options)
    expected = plain.draw(theta.cpu().numpy(), batch, (1, 2, 3), rate.cpu().numpy(), **options)
    for section, (gates, rows, probes) in enumerate(expected):
        assert drawn.gates[section].tolist() == gates.tolist()
        assert drawn.rows[section].tolist() == rows + [-1] * (batch - len(rows))
        assert drawn.probes[section].tolist() == probes + [-1] * (batch - len(probes))
        assert drawn.counts[section].tolist() == [len(rows), len(probes)]
        slots = [rows.index(b) if b in rows else -1 for b in range(batch)]
        assert drawn.slots[section].tolist() == slots
