"""The draw, bit for bit, and the projected step against the eager specification."""

import pytest
import torch

from layerprune.kernels import OPERATORS
from layerprune.ops import draw, projected_step

sample_gates, projected_gate_step_ = (
    OPERATORS[name] for name in ("sample_gates", "projected_gate_step_")
)


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
@pytest.mark.parametrize("batch", [0, 1, 7, 16, 33, 100])
@pytest.mark.parametrize(("min_rows", "row_multiple"), [(0, 1), (2, 8), (500, 1000)])
def test_draw(batch, scheme, min_rows, row_multiple):
    """Gates, places, lists and counts, also with a seed and rows beyond 32 bits of a sign."""
    theta = torch.tensor([0.0, 1.0, 0.5, 0.3, 2.0**-24])
    rate = torch.tensor([0.0, 0.0, 1.0, 0.25, 0.5])
    for state in ([1, 0, 0], [-(2**63), 2**40 + 3, 2**32 - 1 - batch]):
        arguments = (theta, batch, torch.tensor(state), rate, min_rows, row_multiple, scheme)
        for found, expected in zip(
            sample_gates(*arguments), draw.reference(*arguments), strict=True
        ):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_draw_of_no_section():
    drawn = sample_gates(
        torch.zeros(0), 4, torch.tensor([1, 2, 3]), torch.zeros(0), 1, 1, "systematic"
    )
    assert [tuple(t.shape) for t in drawn] == [(0, 4)] * 4 + [(0, 2)]


@pytest.mark.parametrize("batch", [2048, 2049])
def test_draw_of_many_rows(batch):
    """The largest that is ranked by comparing, and the first that is sorted."""
    arguments = (
        torch.tensor([0.4]), batch, torch.tensor([1, 2, 3]), torch.tensor([0.1]), 1, 8,
        "systematic",
    )  # fmt: skip
    for found, expected in zip(sample_gates(*arguments), draw.reference(*arguments), strict=True):
        assert torch.equal(found, expected)


def state(sections):
    """Theta, statistics and who is in play, at the start."""
    return (
        torch.full((sections,), 0.5),
        torch.zeros(projected_step.STATISTICS, sections),
        torch.zeros(sections, dtype=torch.bool),
    )


@pytest.mark.parametrize("max_descending", [-1, 1, 3])
@pytest.mark.parametrize(("sections", "rows"), [(1, 5), (11, 300), (40, 16)])
def test_step(sections, rows, max_descending):
    """Several steps on end; sections without evidence, or not free, are left as they are."""
    generator = torch.Generator().manual_seed(sections)
    found, expected = state(sections), state(sections)
    free = torch.rand(sections, generator=generator) < 0.8
    penalty = torch.rand(sections, generator=generator) * 0.1 + 0.01
    numbers = (10.0, 4.0, 0.9, 1.0, max_descending)
    for _ in range(4):
        slope = torch.randn(sections, rows, generator=generator) - 0.02
        counted = torch.rand(sections, rows, generator=generator) < 0.1
        counted[::4] = False
        projected_gate_step_(*found, slope, counted, penalty, free, *numbers)
        projected_step.reference(*expected, slope, counted, penalty, free, *numbers)
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert free.any() and (sections == 1 or not torch.equal(found[0], state(sections)[0]))


def test_equal_excess_goes_to_the_first():
    """Places among equals by number; who falls already keeps its place."""
    theta, statistics, in_play = state(6)
    in_play[4] = True
    projected_gate_step_(
        theta, statistics, in_play, torch.ones(6, 2), torch.ones(6, 2, dtype=torch.bool),
        torch.ones(6), torch.ones(6, dtype=torch.bool), 10.0, 0.0, 1.0, 1.0, 3,
    )  # fmt: skip
    assert in_play.tolist() == [True, True, False, False, True, False]


def test_step_in_strided_tensors():
    """What is not contiguous is copied, and copied back."""
    held = [torch.stack((t, t), -1) for t in state(5)]
    slope, counted = torch.randn(5, 4), torch.ones(5, 4, dtype=torch.bool)
    rest = (slope, counted, torch.ones(5), torch.ones(5, dtype=torch.bool))
    projected_gate_step_(*(t[..., 0] for t in held), *rest, 10.0, 4.0, 0.9, 1.0, -1)
    expected = state(5)
    projected_step.reference(*expected, *rest, 10.0, 4.0, 0.9, 1.0, -1)
    for tensor, want, before in zip(held, expected, state(5), strict=True):
        torch.testing.assert_close(tensor[..., 0], want)
        assert torch.equal(tensor[..., 1], before)
