"""The gated residual sum whose gates the kernel draws, forward and again in backward."""

import pytest
import torch

from layerprune.ops import draw, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STATES = [[3, 5, 2**32 - 80], [-(2**63), 2**40 + 3, 7]]


@pytest.mark.parametrize(("relu", "lerp"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 32, 9001])
def test_sampled(implementation, close, size, dtype, relu, lerp):
    """The gates are those of the independent scheme, bit for bit, and backward draws them again."""
    generator = torch.Generator().manual_seed(size)
    batch = 66 if size < 100 else 5
    x, branch, grad = (torch.randn(batch, size, generator=generator).to(dtype) for _ in range(3))
    theta = torch.tensor(0.4)
    for numbers in STATES:
        state = torch.stack((torch.tensor(numbers), torch.zeros(3, dtype=torch.int64)), 1)[:, 0]
        y, gates = implementation("sampled_gated_residual", x, branch, theta, state, 4, relu, lerp)
        rates, none = theta.expand(5), torch.zeros(5)
        drawn = draw.reference(rates, batch, state, none, 0, 1, "independent")[0][4]
        assert torch.equal(gates, drawn) and 0 < gates.sum() < batch
        exact = reference.gated_residual(x.double(), branch.double(), gates, None, relu, lerp)
        eager = reference.gated_residual(x, branch, gates, None, relu, lerp)
        close(y, eager, exact)
        kept = eager if relu else None
        found = implementation("sampled_gated_residual_backward", grad, kept, theta, state, 4, lerp)
        given = (gates, None, None, None, batch, lerp)
        eager = reference.gated_residual_backward(grad, kept, *given)
        exact = reference.gated_residual_backward(
            grad.double(), None if kept is None else kept.double(), *given
        )
        for tensor, rough, want in zip(found, eager, exact, strict=False):
            close(tensor, rough, want)


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_certain(implementation, theta):
    x, state = torch.ones(9, 3), torch.tensor([1, 2, 3])
    y, gates = implementation(
        "sampled_gated_residual", x, x, torch.tensor(theta), state, 0, False, False
    )
    assert torch.equal(gates, torch.full((9,), theta)) and torch.equal(y, x + theta)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_empty(implementation, shape):
    """Rows without elements have gates all the same."""
    x, theta, state = torch.zeros(shape), torch.tensor(1.0), torch.tensor([1, 2, 3])
    y, gates = implementation("sampled_gated_residual", x, x, theta, state, 0, True, False)
    assert y.shape == shape and torch.equal(gates, torch.ones(shape[0]))
    found = implementation("sampled_gated_residual_backward", x, x, theta, state, 0, False)
    assert [f.shape for f in found] == [shape, shape]
