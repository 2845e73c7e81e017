"""Rows gathered, and added to where they came from."""

import pytest
import torch

from layerprune.ops import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LIBRARY = torch.ops.layerprune
NONE = torch.zeros(0, dtype=torch.int64)


def between(tensor):
    """Rows that are dense, with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 1)[:, 0]


def strided(tensor):
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, strided, between])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 5), (4, 4, 4), (3, 50, 65)])
def test_gather_and_scatter(implementation, close, shape, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x, source = (layout(torch.randn(n, *shape, generator=generator).to(dtype)) for n in (6, 4))
    chosen = torch.tensor([5, 0, 3, 2])
    assert torch.equal(implementation("gather_rows", x, chosen), x[chosen])
    base = x.clone(memory_format=reference.row_format(x))
    eager = base.clone()
    LIBRARY.scatter_add_rows_(eager, chosen, source)
    exact = base.double().index_add(0, chosen, source.double())
    found, *_ = implementation.in_place("scatter_add_rows_", base, chosen, source)
    close(found, eager, exact)


def test_many_rows(implementation):
    generator = torch.Generator().manual_seed(2)
    count = 200 if implementation.slow else 4000
    x = torch.randn(count, 3, generator=generator)
    rows = torch.randperm(count, generator=generator)[: count * 3 // 4]
    assert torch.equal(implementation("gather_rows", x, rows), x[rows])
    found, *_ = implementation.in_place("scatter_add_rows_", x, rows, x[rows])
    expected = x.clone()
    expected[rows] *= 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_gather_of_any_dtype(implementation, dtype):
    """Bytes are moved, in words of any width."""
    x = torch.arange(6 * 5).reshape(6, 5).to(dtype)
    rows = torch.tensor([4, 1])
    assert torch.equal(implementation("gather_rows", x, rows), x[rows])


def test_absurd_indices_harm_nothing(implementation):
    """Out of range is absent: on a device nobody has looked."""
    x = torch.ones(3, 2)
    rows = torch.tensor([-5, 1, 2**40])
    assert implementation("gather_rows", x, rows).tolist() == [[0, 0], [1, 1], [0, 0]]
    found, *_ = implementation.in_place("scatter_add_rows_", x, torch.tensor([7, -1, 2]), x)
    assert found.tolist() == [[1, 1], [1, 1], [2, 2]]


def test_empty(implementation):
    x = torch.ones(2, 3)
    assert implementation("gather_rows", x, NONE).shape == (0, 3)
    assert implementation("gather_rows", x[:, :0], torch.tensor([1])).shape == (1, 0)
    found, *_ = implementation.in_place("scatter_add_rows_", x, NONE, x[:0])
    assert torch.equal(found, x)
