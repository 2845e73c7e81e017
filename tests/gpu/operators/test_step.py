"""The projected step of all sections, and their competition."""

import pytest
import torch

from layerprune.ops import projected_step


def start(sections):
    """Theta, statistics and who is in play."""
    return [
        torch.full((sections,), 0.5),
        torch.zeros(projected_step.STATISTICS, sections),
        torch.zeros(sections, dtype=torch.bool),
    ]


def step(implementation, state, *rest):
    return implementation.in_place("projected_gate_step_", *state, *rest)[:3]


SMALL = [(1, 5), (11, 300), (40, 16), (40, 0)]
LARGE = [(1000, 9), (3000, 4)]


@pytest.mark.parametrize(
    ("sections", "rows", "max_descending"),
    [(*shape, number) for shape in SMALL for number in (-1, 1, 3)]
    + [(*shape, 500) for shape in LARGE],
)
def test_step(implementation, sections, rows, max_descending):
    """Several steps on end; sections without evidence, or not free, are left as they are."""
    generator = torch.Generator().manual_seed(sections)
    found, expected = start(sections), start(sections)
    free = torch.rand(sections, generator=generator) < 0.8
    penalty = torch.rand(sections, generator=generator) * 0.1 + 0.01
    numbers = (10.0, 4.0, 0.9, 1.0, max_descending)
    for _ in range(4 if sections < 1000 else 2):
        slope = torch.randn(sections, rows, generator=generator) - 0.02
        counted = torch.rand(sections, rows, generator=generator) < 0.1
        counted[::4] = False
        rest = (slope, counted, penalty, free, *numbers)
        again = step(implementation, found, *rest)
        found = step(implementation, found, *rest)
        projected_step.reference(*expected, *rest)
        assert all(map(torch.equal, found, again))
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert sections == 1 or rows == 0 or not torch.equal(found[0], start(sections)[0])


def test_equal_excess_goes_to_the_first(implementation):
    """Places among equals by number; who falls already keeps its place."""
    theta, statistics, in_play = start(6)
    in_play[4] = True
    _, _, in_play = step(
        implementation, (theta, statistics, in_play), torch.ones(6, 2),
        torch.ones(6, 2, dtype=torch.bool), torch.ones(6), torch.ones(6, dtype=torch.bool),
        10.0, 0.0, 1.0, 1.0, 3,
    )  # fmt: skip
    assert in_play.tolist() == [True, True, False, False, True, False]


def test_strided_state(implementation):
    """What is not contiguous is copied, and copied back."""
    held = [implementation.place(torch.stack((t, t), -1)) for t in start(5)]
    slope = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(5, 4, dtype=torch.bool)
    rest = (slope, counted, torch.ones(5), torch.ones(5, dtype=torch.bool))
    placed = map(implementation.place, rest)
    implementation.operators["projected_gate_step_"](
        *(t[..., 0] for t in held), *placed, 10.0, 4.0, 0.9, 1.0, -1
    )
    expected = start(5)
    projected_step.reference(*expected, *rest, 10.0, 4.0, 0.9, 1.0, -1)
    for tensor, want, before in zip(held, expected, start(5), strict=True):
        torch.testing.assert_close(tensor[..., 0].cpu(), want)
        assert torch.equal(tensor[..., 1].cpu(), before)
