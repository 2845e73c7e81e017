"""The kernels' draw at the sizes of real batches."""

import pytest
import torch

from layerprune import ops
from layerprune.ops.draw import reference


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
@pytest.mark.parametrize(
    ("sections", "batch", "options"), [(54, 256, (0, 1)), (7, 1000, (2, 1)), (110, 128, (2, 8))]
)
def test_equals_the_reference(scheme, sections, batch, options, threads, kernels):
    """Every output, bit for bit, at any number of threads."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(sections, generator=generator)
    theta[:4] = torch.tensor([0.0, 1.0, 2.0**-24, 1 - 2.0**-24])
    rate = torch.rand(sections, generator=generator) * 0.3 * (torch.arange(sections) % 3 > 0)
    for number in range(3):
        state = torch.tensor([1, number, 17])
        expected = reference(theta, batch, state, rate, *options, scheme)
        for count in (1, 2, 5):
            threads(count)
            drawn = ops.sample_gates(
                theta,
                batch,
                state,
                rate,
                min_rows=options[0],
                row_multiple=options[1],
                scheme=scheme,
            )
            for found, want in zip(drawn, expected, strict=True):
                assert found.dtype == want.dtype and torch.equal(found, want)
