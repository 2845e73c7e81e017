"""`torch.library.opcheck` for the operators behind the public functions."""

import pytest
import torch

LIBRARY = torch.ops.layerprune
SLOT = torch.tensor([2, -1, 0, -1, 1, -1], dtype=torch.int32)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _rows(count, seed, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 4, generator=generator).contiguous(memory_format=layout)


@pytest.mark.parametrize("lerp", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
@pytest.mark.parametrize("asked", [None, [], [1, 4, 0]])
def test_gate_factor(lerp, slotted, asked):
    """Schema, fake and dynamic shapes; the factor's row count is the branch's or that asked for."""
    x, branch = _rows(6, 0, torch.channels_last), _rows(3 if slotted else 6, 1)
    rows = None if asked is None else torch.tensor(asked, dtype=torch.int64)
    arguments = (x, branch, SLOT if slotted else None, rows, lerp)
    torch.library.opcheck(LIBRARY.gate_factor.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [5], [4, 0, 1]])
@pytest.mark.parametrize("differentiable", [False, True])
def test_gather_and_scatter(layout, rows, differentiable):
    """Both have a gradient, which is the other."""
    x, source = _rows(6, 0, layout), _rows(len(rows), 1)
    rows = torch.tensor(rows, dtype=torch.int64)
    x.requires_grad_(differentiable)
    source.requires_grad_(differentiable)
    torch.library.opcheck(LIBRARY.gather_rows.default, (x, rows))
    torch.library.opcheck(LIBRARY.scatter_add_rows.default, (x, rows, source))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [4, 0, 1]])
def test_scatter_in_place(layout, rows):
    """The schema says truly that ``out`` alone is written to."""
    out, source = _rows(6, 0, layout), _rows(len(rows), 1)
    rows = torch.tensor(rows, dtype=torch.int64)
    torch.library.opcheck(LIBRARY.scatter_add_rows_.default, (out, rows, source))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    """The factor is widened for half precision only."""
    x, branch = _rows(6, 0).to(dtype), _rows(3, 1).to(dtype)
    torch.library.opcheck(LIBRARY.gate_factor.default, (x, branch, SLOT, None, True))
    gate = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0])
    arguments = (x, branch, gate, SLOT, torch.tensor([2, 5]), False, True)
    torch.library.opcheck(LIBRARY.gated_residual.default, arguments)
