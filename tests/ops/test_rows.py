"""``take_rows``, alone and in front of a branch; compilation and recomputation of the pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from layerprune import ops

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _leaf(*shape, seed=0, layout="contiguous"):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def _section(x, weight, gate, rows, slot, probes, exclusive=True):
    """A section as a network has it: gather, branch on the rows, sum."""
    taken, rest = ops.take_rows(x, rows, exclusive=exclusive)
    branch = torch.tanh(taken * weight)
    return ops.gated_residual(rest, branch, gate, slot, "relu", gate_grad_rows=probes)


def _arguments(batch=6, rows=(0, 2, 5), dtype=torch.float64):
    slot = torch.full((batch,), -1, dtype=torch.int32)
    slot[list(rows)] = torch.arange(len(rows), dtype=torch.int32)
    gate = (slot >= 0).float()
    gate[rows[1]] = 0.4
    return {
        "x": _leaf(batch, 3, 4, 4).detach().to(dtype).requires_grad_(),
        "weight": _leaf(3, 1, 1, seed=1).detach().to(dtype).requires_grad_(),
        "gate": gate.requires_grad_(),
        "rows": torch.tensor(rows),
        "slot": slot,
        "probes": torch.tensor([rows[1]]),
    }


def _differentiate(function, arguments):
    y = function(**arguments)
    inputs = [arguments[name] for name in ("x", "weight", "gate")]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [4], [5, 0, 3], [0, 1, 2, 3, 4, 5]])
def test_take_rows(exclusive, layout, rows):
    """Values, memory format and the gradient of both outputs, of either, of neither."""
    x, rows = _leaf(6, 3, 4, 4, layout=layout), torch.tensor(rows, dtype=torch.int64)
    taken, rest = ops.take_rows(x, rows, exclusive=exclusive)
    assert torch.equal(taken, x[rows]) and torch.equal(rest, x)
    assert taken.is_contiguous(memory_format=LAYOUTS[layout])
    d_taken, d_rest = torch.randn_like(taken), torch.randn_like(rest)
    scattered = torch.zeros_like(x).index_add(0, rows, d_taken)
    for outputs, grads, want in (
        ([taken, rest], [d_taken, d_rest], d_rest + scattered),
        ([taken], [d_taken], scattered),
        ([rest], [d_rest], d_rest.clone()),
    ):
        grads = [g.clone(memory_format=torch.preserve_format) for g in grads]
        (found,) = torch.autograd.grad(outputs, x, grads, retain_graph=True)
        torch.testing.assert_close(found, want)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 6),
    count=st.integers(0, 6),
    shape=st.lists(st.integers(0, 3), max_size=4),
    layout=st.sampled_from(["contiguous", "channels_last", "expanded", "sliced"]),
    exclusive=st.booleans(),
    used=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 2**16),
)
def test_take_rows_over_shapes(batch, count, shape, layout, exclusive, used, seed):
    """Values and the gradient of either or both outputs against NumPy, for any shape; exact.

    ``layout`` is that of the shortcut's gradient, which is not written to without the promise, nor
    where it is a view.
    """
    random = np.random.default_rng(seed)
    rows = random.permutation(batch)[: min(count, batch)]
    x = random.standard_normal((batch, *shape))
    d_rows, d_rest = random.standard_normal((len(rows), *shape)), random.standard_normal(x.shape)
    leaf = torch.as_tensor(x).requires_grad_()
    taken, rest = ops.take_rows(leaf, torch.as_tensor(rows), exclusive=exclusive)
    assert np.array_equal(taken.detach().cpu(), x[rows])
    assert np.array_equal(rest.detach().cpu(), x)
    given_rest = torch.as_tensor(d_rest.copy())
    if layout == "channels_last" and len(shape) == 3:
        given_rest = given_rest.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        given_rest = torch.tensor(d_rest.flat[0] if x.size else 0.0).expand(x.shape)
    elif layout == "sliced":
        given_rest = torch.as_tensor(np.repeat(d_rest, 2, axis=0))[::2]
    before = given_rest.cpu().numpy().copy()
    want = np.zeros_like(x)
    if used[1]:
        want += before
    if used[0]:
        np.add.at(want, rows, d_rows)
    pairs = zip((taken, rest), (torch.as_tensor(d_rows), given_rest), used, strict=True)
    outputs, grads = zip(*[(output, grad) for output, grad, use in pairs if use], strict=True)
    (found,) = torch.autograd.grad(outputs, leaf, grads)
    assert np.array_equal(found.cpu(), want)
    if layout in ("expanded", "sliced") or not exclusive:
        assert np.array_equal(given_rest.cpu(), before)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_shortcut_gradient_of_others_is_untouched(exclusive):
    """A gradient that is a view or broadcast is never written to, nor any without the promise."""
    x, rows = _leaf(4, 3), torch.tensor([1, 3])
    base = torch.ones(8, 3, dtype=torch.float64)
    broadcast = torch.ones((), dtype=torch.float64).expand(4, 3)
    own = torch.ones(4, 3, dtype=torch.float64)
    for grad in (base[2:6], broadcast, base.t()[:, :4].t()) + (() if exclusive else (own,)):
        taken, rest = ops.take_rows(x, rows, exclusive=exclusive)
        d_taken = torch.full_like(taken, 2.0)
        (found,) = torch.autograd.grad([taken, rest], x, [d_taken, grad])
        assert found.tolist() == [[1.0] * 3, [3.0] * 3] * 2
        assert base.eq(1).all() and broadcast.eq(1).all() and own.eq(1).all()


@pytest.mark.parametrize("make", ["strided", "transposed", "every other row"])
def test_scatter_in_place_is_done_or_refused(make):
    """A target that is neither contiguous nor channels_last is never left as it was in silence."""
    out = {
        "strided": torch.zeros(4, 3, 10)[..., ::2],
        "transposed": torch.zeros(4, 5, 3).transpose(1, 2),
        "every other row": torch.zeros(8, 3, 5)[::2],
    }[make]
    rows, source = torch.tensor([3, 1]), torch.ones(2, 3, 5)
    try:
        torch.ops.layerprune.scatter_add_rows_(out, rows, source)
        changed = True
    except RuntimeError:
        changed = False
    want = torch.zeros(4, 3, 5)
    want[rows] = float(changed)
    assert torch.equal(out, want)


def test_take_rows_gradcheck():
    """First and second derivative; with create_graph nothing is done in place."""
    x, rows = _leaf(5, 3), torch.tensor([3, 0])

    def run(x):
        taken, rest = ops.take_rows(x, rows)
        return taken.sin(), rest.exp()

    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_section_equals_indexing(layout):
    """Gather, branch and sum, in place, against plain indexing; exclusive and not."""
    arguments = _arguments()
    x = arguments["x"].detach().contiguous(memory_format=LAYOUTS[layout])
    arguments["x"] = x.requires_grad_()

    def indexed(x, weight, gate, rows, slot, probes):
        branch = torch.tanh(x[rows] * weight) * gate[rows].view(-1, 1, 1, 1)
        return x.index_add(0, rows, branch).relu()

    expected = _differentiate(indexed, arguments)
    asked = torch.zeros(6, dtype=torch.bool)
    asked[arguments["probes"]] = True
    expected[3] = torch.where(asked, expected[3], 0)
    for exclusive in (False, True):
        found = _differentiate(
            lambda exclusive=exclusive, **a: _section(**a, exclusive=exclusive), arguments
        )
        for tensor, want in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, want)


def test_backward_twice_gives_the_same():
    """retain_graph: an in-place accumulation leaves nothing behind."""
    arguments = _arguments()
    y = _section(**arguments)
    first, second = (
        torch.autograd.grad(y.sum(), arguments["x"], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("exclusive", [False, True])
def test_compiles_to_a_full_graph(exclusive):
    """One graph for the section, with the number of rows dynamic; same values and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(_section, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows in ((0, 2, 5), (1, 3, 4, 5)):
            arguments = _arguments(rows=rows) | {"exclusive": exclusive}
            torch._dynamo.mark_dynamic(arguments["rows"], 0)
            for tensor, want in zip(
                _differentiate(compiled, arguments),
                _differentiate(_section, arguments),
                strict=True,
            ):
                torch.testing.assert_close(tensor, want, rtol=0, atol=0)


def test_the_number_of_rows_does_not_recompile():
    """With the rows' size marked dynamic, one compilation serves every number of rows."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_section, fullgraph=True, backend=counter)
    for rows in ((0, 2, 5), (1, 3, 4, 5), (2, 3)):
        arguments = _arguments(rows=rows)
        torch._dynamo.mark_dynamic(arguments["rows"], 0)
        _differentiate(compiled, arguments)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Recomputing the section in backward changes nothing: the draw comes in as tensors."""
    arguments = _arguments()

    def recomputed(**arguments):
        return checkpoint(_section, *arguments.values(), use_reentrant=reentrant)

    def grads(function):
        y = function(**arguments)
        inputs = [arguments[name] for name in ("x", "weight", "gate")]
        for leaf in inputs:
            leaf.grad = None
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in inputs)]

    for tensor, want in zip(grads(recomputed), grads(_section), strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 1], dtype=torch.int32), "rows must be torch.int64"),
        (torch.tensor([[0]]), r"rows must be .* got torch.int64 of shape \[1, 1\]"),
        (torch.tensor(0), "rows must be torch.int64 with one dimension"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "rows is on meta"),
    ],
)
def test_errors(rows, message):
    """Each bad argument is named, with what was got."""
    with pytest.raises(ValueError, match=message):
        ops.take_rows(torch.zeros(3, 2), rows)
