"""Operation 4: the projected step, its running statistics and the competition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from layerprune import ops
from layerprune.ops.projected_step import STATISTICS, row_variance, standard_error

OPTIONS = {
    "horizon": 10.0,
    "noise_factor": 4.0,
    "decay": 0.9,
    "confidence": 1.0,
    "max_descending": 2,
}
PLAIN = OPTIONS | {"noise_factor": 0.0, "max_descending": None}


class Run:
    """The state of some sections, and steps on it."""

    def __init__(self, theta, penalty=0.05, **options):
        self.theta = torch.tensor(theta, dtype=torch.float32)
        count = self.theta.numel()
        self.statistics = torch.zeros(STATISTICS, count)
        self.in_play = torch.zeros(count, dtype=torch.bool)
        self.penalty = torch.full((count,), penalty)
        self.free = torch.ones(count, dtype=torch.bool)
        self.options = OPTIONS | options

    def step(self, slope, counted=None):
        slope = torch.as_tensor(slope, dtype=torch.float32)
        counted = torch.ones_like(slope, dtype=torch.bool) if counted is None else counted
        state = (self.theta, self.statistics, self.in_play)
        ops.projected_gate_step_(*state, slope, counted, self.penalty, self.free, **self.options)
        return self.theta.clone()


def _evidence(generator, sections, rows):
    slope = 0.3 * torch.randn(sections, rows, generator=generator)
    counted = torch.rand(sections, rows, generator=generator) < 0.3
    counted[0] = False
    return slope, counted


def test_plain_projected_sgd():
    """Without noise bound and competition: theta - (g + nu) / (nu h), clipped."""
    generator = torch.Generator().manual_seed(0)
    run = Run([0.0, 0.2, 0.5, 0.9, 1.0, 0.5], **PLAIN)
    run.penalty = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
    run.free[5] = False
    expected = run.theta.double().cpu().numpy()
    nu = run.penalty.double().cpu().numpy()
    for _ in range(60):
        slope, counted = _evidence(generator, 6, 12)
        found = run.step(slope, counted).cpu().numpy()
        for section in range(5):
            picked = slope[section][counted[section]].double().cpu().numpy()
            if picked.size:
                step = (picked.mean() + nu[section]) / (nu[section] * OPTIONS["horizon"])
                expected[section] = min(max(expected[section] - step, 0.0), 1.0)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found[0] == 0.0 and found[5] == 0.5


def test_a_useless_section_falls_in_horizon_steps():
    run = Run([1.0], **PLAIN)
    for _ in range(9):
        theta = run.step([[0.0, 0.0]])
    assert 0.05 < float(theta) < 0.15
    assert float(run.step([[0.0, 0.0]])) == pytest.approx(0, abs=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    limit=st.sampled_from([None, 1, 3, 99]),
    noise=st.sampled_from([0.0, 4.0]),
)
def test_theta_stays_in_the_unit_interval(seed, scale, limit, noise):
    generator = torch.Generator().manual_seed(seed)
    run = Run(torch.rand(4, generator=generator).tolist(), max_descending=limit, noise_factor=noise)
    for _ in range(8):
        slope, counted = _evidence(generator, 4, 5)
        theta = run.step(slope * scale, counted)
        assert bool(((theta >= 0) & (theta <= 1)).all())


def test_running_statistics_equal_the_weighted_formulas():
    """Sums over the steps with evidence, weighted by rows and decayed by age, in NumPy."""
    generator = torch.Generator().manual_seed(1)
    run = Run([0.5] * 4)
    history = [[] for _ in range(4)]
    for _ in range(40):
        slope, counted = _evidence(generator, 4, 9)
        run.step(slope, counted)
        for section in range(4):
            picked = slope[section][counted[section]].double().cpu().numpy()
            if picked.size:
                history[section].append((picked.mean(), picked.size))
    assert run.statistics[:, 0].eq(0).all()
    assert float(row_variance(run.statistics)[0]) == 0
    assert float(standard_error(run.statistics)[0]) == np.inf
    for section in range(1, 4):
        means, rows = (np.array(column, float) for column in zip(*history[section], strict=True))
        decay = OPTIONS["decay"] ** np.arange(len(means) - 1, -1, -1.0)
        weights = decay * rows
        mean = np.average(means, weights=weights)
        deviations = np.sum(weights * (means - mean) ** 2)
        # Var(mean of n rows) = v / n: E[deviations] = v (sum(decay) - sum(w^2 / n) / sum(w)).
        squares = np.sum(decay**2 * rows)
        variance = deviations / (decay.sum() - squares / weights.sum())
        expected = [decay.sum(), weights.sum(), squares, mean, deviations]
        np.testing.assert_allclose(run.statistics[:, section].cpu(), expected, rtol=1e-4, atol=1e-6)
        assert float(row_variance(run.statistics)[section]) == pytest.approx(variance, rel=1e-3)
        error = np.sqrt(variance * squares) / weights.sum()
        assert float(standard_error(run.statistics)[section]) == pytest.approx(error, rel=1e-3)


def test_variance_and_standard_error_are_right_on_average():
    """2000 sections of independent rows with variance 0.09: both within 5 standard errors."""
    generator = torch.Generator().manual_seed(2)
    run = Run([0.5] * 2000, decay=0.8)
    for _ in range(40):
        counted = torch.rand(2000, 8, generator=generator) < 0.5
        run.step(0.3 * torch.randn(2000, 8, generator=generator), counted)
    variance = row_variance(run.statistics)
    spread = float(variance.std()) / 2000**0.5
    assert abs(float(variance.mean()) - 0.09) < 5 * spread
    # The running means' own spread is what the standard error claims (ratio of variances near 1).
    ratio = float(run.statistics[3].var() / standard_error(run.statistics).square().mean())
    assert abs(ratio - 1) < 5 * (2 / 2000) ** 0.5


def test_noise_bounds_the_step():
    """h = c var / nu^2 where that is above the horizon: a noisier section moves less."""
    generator = torch.Generator().manual_seed(3)
    run = Run([0.5, 0.5], max_descending=None)
    noise = torch.randn(200, 2, 4, generator=generator)
    noise -= noise.mean((0, 2), keepdim=True)
    for k in range(200):
        run.theta.fill_(0.5)
        slope = noise[k] * torch.tensor([[0.001], [1.0]])
        theta = run.step(slope)
        variance = row_variance(run.statistics) / 4
        nu = run.penalty
        duration = (4.0 * variance / nu**2).clamp_min(10.0)
        expected = (0.5 - (slope.mean(1) + nu) / (nu * duration)).clamp(0, 1)
        torch.testing.assert_close(theta, expected, atol=1e-5, rtol=1e-4)
    assert float(duration[0]) == 10.0 and float(duration[1]) > 300


def test_held_sections_do_not_fall():
    """All are useless; at most two fall in a step, those stay in play, the rest stand still."""
    run = Run([0.9] * 5, noise_factor=0.0)
    excess = torch.tensor([0.01, 0.04, 0.02, 0.05, 0.03])
    before = run.theta.clone()
    run.step(excess[:, None].expand(5, 3))
    assert run.in_play.tolist() == [False, True, False, True, False]
    for k in range(3):
        # Later on another one looks worse: no place is free, those falling go on.
        slope = excess.clone()
        slope[0] = 0.2
        theta = run.step(slope[:, None].expand(5, 3))
        fell = theta < before
        assert int(fell.sum()) <= 2, k
        assert fell.tolist() == run.in_play.tolist() == [False, True, False, True, False]
        before = theta


def test_a_place_in_play_is_freed():
    """A section that is no longer free, or pays after all, makes room for the next."""
    run = Run([0.9] * 3, noise_factor=0.0, max_descending=1)
    run.step([[0.01] * 2, [0.03] * 2, [0.02] * 2])
    assert run.in_play.tolist() == [False, True, False]
    run.free[1] = False
    held = float(run.theta[1])
    run.step([[0.01] * 2, [0.03] * 2, [0.02] * 2])
    assert run.in_play.tolist() == [False, False, True]
    assert float(run.theta[1]) == held
    for _ in range(30):
        run.step([[0.01] * 2, [0.03] * 2, [-0.5] * 2])
    assert run.in_play.tolist() == [True, False, False]
    assert float(run.theta[2]) == 1.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), limit=st.integers(1, 4))
def test_competition(seed, limit):
    """At most `limit` fall; a held one rises only below the bound; the fallen pay nothing."""
    generator = torch.Generator().manual_seed(seed)
    run = Run([0.5] * 6, max_descending=limit)
    level = 0.1 * torch.randn(6, 1, generator=generator)
    for _ in range(12):
        before = run.theta.clone()
        slope, counted = _evidence(generator, 6, 8)
        theta = run.step(slope + level, counted)
        excess = run.statistics[3] + run.penalty
        bound = excess + OPTIONS["confidence"] * standard_error(run.statistics)
        fell, rose = theta < before, theta > before
        assert int(run.in_play.sum()) <= limit
        assert bool((fell <= (run.in_play | (bound < 0))).all())
        assert bool((rose <= (run.in_play | (bound < 0))).all())
        assert bool((run.in_play <= (excess > 0)).all())
        assert bool((theta == before)[~counted.any(1)].all())


def test_a_held_section_does_not_rise_on_noise():
    """Slope below -nu, but not significantly: a section that is held waits for evidence."""
    run = Run([0.5, 0.5], noise_factor=0.0, decay=1.0)
    slopes = torch.tensor([[-0.9, 0.7], [-0.06, -0.061]])
    for k in range(6):
        theta = run.step(slopes[:, k % 2, None].expand(2, 4))
    bound = run.statistics[3] + run.penalty + standard_error(run.statistics)
    assert float(run.statistics[3, 0] + run.penalty[0]) < 0 < float(bound[0])
    assert float(theta[0]) == 0.5
    assert float(bound[1]) < 0 and float(theta[1]) > 0.5


def _arguments():
    run = Run([0.5, 0.2, 1.0])
    generator = torch.Generator().manual_seed(4)
    slope, counted = _evidence(generator, 3, 5)
    values = (10.0, 4.0, 0.9, 1.0, 2)
    return run.theta, run.statistics, run.in_play, slope, counted, run.penalty, run.free, *values


def test_updates_are_counted():
    """A backward that saved theta before the step notices that it has changed."""
    run = Run([0.5, 0.2], **PLAIN)
    x = torch.ones(4, 3, requires_grad=True)
    state = torch.tensor([1, 2, 3])
    y, _ = ops.sampled_gated_residual(x, x * 2, run.theta[0], state, 0)
    before = [t._version for t in (run.theta, run.statistics, run.in_play)]
    run.step([[0.1], [0.2]])
    after = [t._version for t in (run.theta, run.statistics, run.in_play)]
    assert all(new > old for new, old in zip(after, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    torch.library.opcheck(torch.ops.layerprune.projected_gate_step_.default, _arguments())


def test_fake():
    with FakeTensorMode() as mode:
        arguments = [
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for value in _arguments()
        ]
        assert torch.ops.layerprune.projected_gate_step_(*arguments) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"statistics": torch.zeros(3, 2)}, "statistics"),
        ({"penalty": torch.ones(3)}, "penalty"),
        ({"slope": torch.zeros(2, 4)}, r"counted must be torch.bool of shape \[2, 4\]"),
        ({"slope": torch.zeros(3, 5), "counted": torch.ones(3, 5, dtype=torch.bool)}, "slope"),
        ({"slope": torch.zeros(10)}, r"slope must be \[2, rows\]"),
        ({"slope": torch.zeros(2, 5).double()}, "slope must be torch.float32"),
        ({"free": torch.ones(3, dtype=torch.bool)}, r"free must be torch.bool of shape \[2\]"),
        ({"in_play": torch.zeros(2)}, "in_play must be torch.bool"),
        ({"theta": torch.zeros(2).double()}, "theta must be torch.float32"),
        ({"penalty": torch.ones(2, device="meta")}, "penalty is on meta"),
        ({"horizon": 0.5}, "horizon"),
        ({"noise_factor": -1.0}, "noise_factor"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.5}, "decay"),
        ({"horizon": float("nan")}, "horizon"),
        ({"confidence": float("nan")}, "confidence"),
        ({"max_descending": 0}, "max_descending"),
        ({"max_descending": 1.5}, "max_descending must be a whole number"),
    ],
)
def test_errors(change, message):
    tensors = {
        "theta": torch.full((2,), 0.5),
        "statistics": torch.zeros(STATISTICS, 2),
        "in_play": torch.zeros(2, dtype=torch.bool),
        "slope": torch.zeros(2, 5),
        "counted": torch.ones(2, 5, dtype=torch.bool),
        "penalty": torch.ones(2),
        "free": torch.ones(2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        ops.projected_gate_step_(**(tensors | OPTIONS | change))
