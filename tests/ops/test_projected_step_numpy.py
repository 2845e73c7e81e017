"""Operation 4 against NumPy in float64, over shapes, masks, layouts of the state and limits."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprune import ops

STATES = ["contiguous", "column", "transposed", "strided"]
CANARY = 7.0


class Plain:
    """Sections by their history of (mean slope, rows): every sum is formed anew in each step."""

    def __init__(self, theta, penalty, free, options):
        self.theta, self.penalty, self.free = theta.astype(float), penalty.astype(float), free
        self.options = options
        self.history = [[] for _ in theta]
        self.playing = np.zeros(len(theta), bool)

    def sums(self, section):
        """The five running statistics of a section."""
        if not self.history[section]:
            return np.zeros(5)
        means, rows = np.array(self.history[section], float).T
        age = np.arange(len(means) - 1, -1, -1.0)
        decay = self.options["decay"] ** age
        mean = np.average(means, weights=decay * rows)
        deviations = np.sum(decay * rows * (means - mean) ** 2)
        return np.array(
            [decay.sum(), (decay * rows).sum(), (decay**2 * rows).sum(), mean, deviations]
        )

    def variance(self, section):
        """Of one row's slope, from the spread between steps."""
        steps, rows, squares, _, deviations = self.sums(section)
        freedom = steps - squares / max(rows, 1e-12)
        return deviations / freedom if freedom > 1e-3 else 0.0

    def wishes(self, slope, counted):
        """Takes the evidence of one step; where theta would go, and who had any."""
        moved, seen = self.theta.copy(), counted.any(1)
        for section in np.flatnonzero(seen):
            picked = slope[section][counted[section]].astype(float)
            self.history[section].append((picked.mean(), picked.size))
            nu = self.penalty[section]
            noise = self.options["noise_factor"] * self.variance(section) / picked.size / nu**2
            duration = max(self.options["horizon"], noise)
            step = (picked.mean() + nu) / (nu * duration)
            moved[section] = np.clip(self.theta[section] - step, 0, 1)
        return moved, seen

    def excess(self):
        """Running mean of slope and penalty, and its upper confidence bound."""
        excess, bound = self.penalty.copy(), np.full(len(self.penalty), np.inf)
        for section in range(len(excess)):
            steps, rows, squares, mean, _ = self.sums(section)
            excess[section] += mean
            if steps > 1:
                error = np.sqrt(self.variance(section) * squares) / rows
                bound[section] = excess[section] + self.options["confidence"] * error
        return excess, bound

    def choice(self, excess):
        """In play are first those that were, then the largest excess, of equal ones the first."""
        limit = self.options["max_descending"]
        if limit is None:
            return self.free
        falling = [
            section
            for section in range(len(excess))
            if self.free[section] and self.history[section] and excess[section] > 0
        ]
        falling.sort(key=lambda section: (not self.playing[section], -excess[section], section))
        return np.isin(np.arange(len(excess)), falling[:limit])

    def step(self, slope, counted):
        """One step."""
        moved, seen = self.wishes(slope, counted)
        excess, bound = self.excess()
        self.playing = self.choice(excess)
        allowed = self.playing.copy()
        if self.options["max_descending"] is not None:
            allowed |= self.free & (bound < 0)
        self.theta = np.where(allowed & seen, moved, self.theta)


def laid_out(values, layout):
    """A tensor of these values, as part of a larger one that is CANARY elsewhere; and that one."""
    shape = values.shape
    base = torch.full([2 * n + 1 for n in shape], CANARY).to(values.dtype)
    if layout == "contiguous":
        return values.clone(), base
    if layout == "transposed":
        base = base.permute(*range(len(shape) - 1, -1, -1)).contiguous()
        base = base.permute(*range(len(shape) - 1, -1, -1))
    if layout == "column":
        base = torch.full((*shape, 3), CANARY).to(values.dtype)
        part = base[..., 1]
    else:
        part = base[tuple(slice(1, None, 2) for _ in shape)]
    part.copy_(values)
    return part, base


def canaries(base, part):
    """Whether what lies around the part is as it was."""
    around = base.clone()
    where = torch.zeros_like(base, dtype=torch.bool)
    where.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(True)
    return bool((around[~where] == torch.tensor(CANARY).to(base.dtype)).all())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sections=st.integers(0, 6),
    rows=st.lists(st.sampled_from([0, 1, 3, 16, 35]), min_size=1, max_size=5),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    limit=st.sampled_from([None, 1, 2, 6]),
    noise_factor=st.sampled_from([0.0, 4.0]),
    decay=st.sampled_from([0.5, 0.9, 1.0]),
    layout=st.sampled_from(STATES),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_numpy(sections, rows, density, limit, noise_factor, decay, layout, ties, seed):
    """A few steps, each of another number of rows: theta, statistics and who is in play.

    With ``ties`` sections get the same evidence in pairs. What is not counted is NaN. The state is
    updated in place wherever it lies, and nothing around it.
    """
    random = np.random.default_rng(seed)
    options = {
        "horizon": 5.0,
        "noise_factor": noise_factor,
        "decay": decay,
        "confidence": 1.0,
        "max_descending": limit,
    }
    theta = random.random(sections).astype(np.float32)
    penalty = random.uniform(0.02, 0.1, sections).astype(np.float32)
    if ties:
        penalty[1::2] = penalty[: len(penalty[1::2]) * 2 : 2]
    free = random.random(sections) < 0.8
    level = 0.1 * random.standard_normal((sections, 1))
    plain = Plain(theta, penalty, free, options)
    values = (
        torch.as_tensor(theta),
        torch.zeros(5, sections),
        torch.zeros(sections, dtype=torch.bool),
    )
    state, bases = zip(*(laid_out(t, layout) for t in values), strict=True)
    for count in rows:
        slope = (level + 0.2 * random.standard_normal((sections, count))).astype(np.float32)
        counted = random.random((sections, count)) < density
        if ties:
            pairs = len(slope[1::2]) * 2
            slope[1::2], counted[1::2] = slope[:pairs:2], counted[:pairs:2]
        shown = torch.as_tensor(np.where(counted, slope, np.float32(np.nan)))
        given = (shown, torch.as_tensor(counted))
        if layout == "transposed":
            given = tuple(t.t().contiguous().t() for t in given)
        ops.projected_gate_step_(
            *state, *given, torch.as_tensor(penalty), torch.as_tensor(free), **options
        )
        plain.step(slope, counted)
        assert state[2].tolist() == plain.playing.tolist()
        np.testing.assert_allclose(state[0].cpu(), plain.theta, atol=1e-4)
        sums = np.array([plain.sums(section) for section in range(sections)]).reshape(-1, 5).T
        np.testing.assert_allclose(state[1].cpu(), sums, rtol=1e-4, atol=1e-5)
    if layout != "contiguous":
        assert all(canaries(base, part) for base, part in zip(bases, state, strict=True))


def one_step(excess, playing, limit):
    """Sections of which nothing was known but who is in play, after a step."""
    count = len(excess)
    state = (torch.full((count,), 0.5), torch.zeros(5, count), torch.tensor(playing))
    slope = torch.tensor(excess)[:, None].expand(count, 4)
    ops.projected_gate_step_(
        *state,
        slope,
        torch.ones(count, 4, dtype=torch.bool),
        torch.full((count,), 0.0625),
        torch.ones(count, dtype=torch.bool),
        horizon=10.0,
        noise_factor=0.0,
        decay=1.0,
        confidence=1.0,
        max_descending=limit,
    )
    return state[2].nonzero().flatten().tolist()


def test_fewer_places_than_before():
    """Where more are in play than there are places, the largest excess keeps them."""
    assert one_step([0.01, 0.0101, 0.0102, 0.0099], [True] * 4, 1) == [2]
    assert one_step([0.01, 0.0101, 0.0102, 0.0099], [True] * 4, 2) == [1, 2]


def test_equal_excess():
    """Of equal ones the first."""
    assert one_step([0.25] * 40, [False] * 40, 3) == [0, 1, 2]
    assert one_step([0.125, *[0.25] * 30], [False] * 31, 2) == [1, 2]


def test_those_in_play_stay_whatever_comes():
    """A section in play that should fall is not displaced, however large another's excess."""
    assert one_step([0.01, 3e6], [True, False], 1) == [0]
