"""The sequential test and the domain-of-attraction rule."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from layerprune.elimination import (
    BATCH_PRIOR,
    Measurement,
    SequentialTest,
    combine,
    in_domain_of_attraction,
    student_tail,
)

PENALTY = 0.05
ROWS = 64


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 33, 34, 63, 95, 500])
def test_student_tail(freedom):
    for t in (-40.0, -3.0, -0.5, 0.0, 1e-6, 0.7, 2.0, 3.5, 6.0):
        expected = stats.t.sf(t, freedom)
        assert student_tail(t, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-13)
    assert student_tail(math.inf, freedom) == 0
    assert student_tail(-math.inf, freedom) == 1


def _flat(mean, variance=1e-4):
    """A batch without skewness."""
    return Measurement(float(mean), float(variance), 0.0, ROWS)


def test_moderated_error():
    """Between-batch squares with n - 1, the batches' own variance with the prior's degrees."""
    means, variances = [0.1, -0.2, 0.05], [0.02, 0.03, 0.01]
    found = combine([Measurement(m, v, 0.0, 8) for m, v in zip(means, variances, strict=True)])
    assert found.freedom == BATCH_PRIOR + 2
    pooled = (BATCH_PRIOR * np.mean(variances) + 2 * np.var(means, ddof=1)) / found.freedom
    assert found.error == pytest.approx(math.sqrt(pooled / 3))
    assert found.mean == pytest.approx(np.mean(means))
    assert found.rows == 24
    assert found.skewness == 0


def test_error_without_rows_is_the_plain_one():
    batches = [Measurement(mean, math.nan, math.nan, 0) for mean in (0.1, 0.4)]
    assert combine(batches[:1]).error == math.inf
    found = combine(batches)
    assert found.freedom == 1 and found.skewness == 0 and found.rows == 0
    assert found.error == pytest.approx(stats.sem([0.1, 0.4]))


def test_the_skewness_is_the_one_of_the_rows():
    """Of batches of one mean: pooled second and third central moments."""
    generator = np.random.default_rng(5)
    rows = generator.lognormal(0.0, 1.0, (3, ROWS))
    rows -= rows.mean(1, keepdims=True)
    found = combine(
        [Measurement(0.0, float(r.var(ddof=1)) / ROWS, float((r**3).mean()), ROWS) for r in rows]
    )
    expected = (rows**3).mean() / rows.var(1, ddof=1).mean() ** 1.5
    assert found.skewness == pytest.approx(expected)
    assert found.rows == 3 * ROWS


def test_tails_without_skewness_are_students():
    found = combine([_flat(0.02), _flat(0.03), _flat(-0.01)])
    score = (found.mean + PENALTY) / found.error
    high, low = found.tails(PENALTY)
    assert high == pytest.approx(stats.t.sf(score, BATCH_PRIOR + 2), rel=1e-6)
    assert low == pytest.approx(stats.t.cdf(score, BATCH_PRIOR + 2), rel=1e-6)


@pytest.mark.parametrize("third", [0.0, -2e-3, 5e-4])
def test_the_tails_fall_and_rise_with_the_difference(third):
    """Whatever the skewness: a higher difference is never less of a reason to eliminate."""
    means = np.linspace(-0.4, 0.4, 81) - PENALTY
    batches = [[Measurement(float(m), 1e-4, third, ROWS)] * 2 for m in means]
    tails = np.array([combine(pair).tails(PENALTY) for pair in batches])
    assert (np.diff(tails[:, 0]) <= 0).all() and (np.diff(tails[:, 1]) >= 0).all()
    assert tails[0, 0] > 0.99 and tails[-1, 1] > 0.99
    assert tails[0, 1] < 1e-6 and tails[-1, 0] < 1e-6


def test_a_long_lower_tail_asks_for_more_before_a_section_goes():
    """Few rows that need the section much may be missing: the chance of a high mean is larger."""
    plain = combine([_flat(0.0)] * 2).tails(PENALTY)
    skewed = combine([Measurement(0.0, 1e-4, -3 * (1e-4 * ROWS) ** 1.5, ROWS)] * 2).tails(PENALTY)
    assert skewed[0] > 3 * plain[0]


@pytest.mark.parametrize(
    "measurement, finite",
    [
        (Measurement(0.1, 0.2, 0.0, 4), True),
        (Measurement(0.1, math.nan, math.nan, 0), True),
        (Measurement(math.nan, 0.2, 0.0, 4), False),
        (Measurement(-math.inf, math.nan, math.nan, 0), False),
        (Measurement(0.1, math.inf, 0.0, 4), False),
    ],
)
def test_what_is_a_number(measurement, finite):
    assert measurement.is_finite is finite


def _noise(kind, generator, shape):
    """Rows of mean 0 and variance 1."""
    if kind == "normal":
        return generator.standard_normal(shape)
    if kind == "heavy":
        return generator.standard_t(5, shape) / math.sqrt(5 / 3)
    # Few rows need the section much: skewness -6; ResNet-20 on digits shows -2 to -9 as it trains.
    draws = generator.lognormal(0.0, 1.0, shape)
    return (math.exp(0.5) - draws) / math.sqrt((math.e - 1) * math.e)


def _batches(kind, generator, count, mean, deviation=0.3, ratio=1.18):
    """Measurements; between batches there is `ratio` times the variance that their rows imply."""
    rows = mean + deviation * _noise(kind, generator, (count, ROWS))
    extra = deviation * math.sqrt((ratio - 1) / ROWS) * generator.standard_normal(count)
    center = rows.mean(1)
    third = ((rows - center[:, None]) ** 3).mean(1)
    columns = (center + extra, rows.var(1, ddof=1) / ROWS, third)
    return [Measurement(*map(float, batch), ROWS) for batch in zip(*columns, strict=True)]


def _attempt(test, section, batches):
    """A pilot, then batches until the attempt ends; the verdict, or None, and the batches used."""
    pilot, *batches = batches
    if not test.worthwhile(section, PENALTY, pilot):
        return None, 1
    for used, measurement in enumerate(batches, start=2):
        test.add(section, measurement)
        verdict = test.verdict(section, PENALTY)
        if verdict is not None or test.batches(section) == 0:
            return verdict, used
    return None, 1 + len(batches)


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
def test_false_eliminations(kind):
    """At Delta = -nu exactly, 15 sections, three attempts each: at most 5 % of the runs lose any.

    120 runs; the share's own standard error at 5 % is 2 %. The bound of 13 runs is passed by a test
    whose rate is 5 % or less with probability > 99.5 %. Three attempts spend 7/8 of the level.
    """
    generator = np.random.default_rng(0)
    failures = 0
    for _ in range(120):
        test = SequentialTest(15, level=0.05, looks=5)
        lost = False
        for section in range(15):
            batches = _batches(kind, generator, 99, -PENALTY)
            start = 0
            for _ in range(3):
                verdict, used = _attempt(test, section, batches[start : start + 33])
                start += used
                if verdict is not None:
                    lost |= verdict.useless
                    break
            if lost:
                break
        failures += lost
    assert failures <= 13


@pytest.mark.parametrize("kind", ["heavy", "skewed"])
def test_the_level_of_one_attempt(kind):
    """At Delta = -nu exactly, 12 000 first attempts at 1/600: 20 are expected to eliminate.

    A test of the stated level exceeds 33 with probability 0.2 %.
    """
    generator = np.random.default_rng(6)
    failures = 0
    for _ in range(12_000):
        verdict, _ = _attempt(SequentialTest(15), 0, _batches(kind, generator, 17, -PENALTY))
        failures += verdict is not None and verdict.useless
    assert failures <= 33


def test_a_needed_section_is_not_lost():
    """Delta = -2 nu, skewed rows: none of 200 sections is eliminated, most are called needed."""
    generator = np.random.default_rng(1)
    needed = 0
    for _ in range(200):
        test = SequentialTest(15)
        verdict, _ = _attempt(test, 0, _batches("skewed", generator, 33, -2 * PENALTY))
        assert verdict is None or not verdict.useless
        needed += verdict is not None
    assert needed > 150


@pytest.mark.parametrize("kind, least", [("normal", 96), ("heavy", 96), ("skewed", 90)])
def test_a_useless_section_is_recognised(kind, least):
    """In one attempt. On skewed rows the guard against false eliminations costs some power."""
    generator = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        test = SequentialTest(15)
        verdict, used = _attempt(test, 0, _batches(kind, generator, 33, 0.0, deviation=0.15))
        if verdict is not None and verdict.useless:
            found += 1
            assert verdict.batches == used - 1 >= 2
            assert verdict.difference + PENALTY > 0
    assert found >= least


def test_looks_are_at_powers_of_two():
    """A clear case is not decided in between, and never on one batch."""
    test = SequentialTest(1)
    test.add(0, _flat(1.0, 1e-9))
    assert test.verdict(0, PENALTY) is None
    generator = np.random.default_rng(3)
    test = SequentialTest(1, looks=5)
    looked = []
    for count in range(1, 33):
        # Undecided until now; a sudden clear value is seen at the next look only.
        test.add(0, _flat(-PENALTY + 0.02 * generator.standard_normal(), 4e-4))
        clear = SequentialTest(1, looks=5)
        for _ in range(count):
            clear.add(0, _flat(1.0, 1e-9))
        if clear.verdict(0, PENALTY) is not None:
            looked.append(count)
        assert test.verdict(0, PENALTY) is None
        if test.batches(0) == 0:
            break
    assert looked == [2, 4, 8, 16, 32]
    assert test.batches(0) == 0


def _critical(attempts, sections=15, looks=5):
    """Smallest excess in standard errors that is called useless at the first look."""
    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        test = SequentialTest(sections, looks=looks)
        for _ in range(attempts):
            for _ in range(2):
                test.add(0, _flat(-PENALTY))
            test.reset(0)
        for _ in range(2):
            error = math.sqrt(BATCH_PRIOR * 1e-4 / (BATCH_PRIOR + 1) / 2)
            test.add(0, _flat(-PENALTY + middle * error))
        verdict = test.verdict(0, PENALTY)
        low, high = (low, middle) if verdict is not None and verdict.useless else (middle, high)
    return high


def test_the_level_is_spent_by_the_union_bound():
    """The critical values of all looks and attempts add up to at most level / sections."""
    spent = 0.0
    for attempts in range(12):
        # The first look's critical value; the looks share as 1 : 2 : 3 : 4 : 5.
        spent += 15 * stats.t.sf(_critical(attempts), BATCH_PRIOR + 1)
    assert 0.04 / 15 < spent <= 0.05 / 15 * 1.0001


def test_a_pilot_is_only_looked_at():
    """`worthwhile` reads: nothing is gathered, no attempt is spent, no verdict comes of it."""
    test = SequentialTest(15)
    test.add(3, _flat(0.0))
    before = test.state_dict()
    assert not test.worthwhile(0, PENALTY, _flat(0.0, 1e4))
    assert test.worthwhile(0, PENALTY, _flat(0.0, 1e-8))
    assert test.worthwhile(0, PENALTY, _flat(-PENALTY, 1e-8))
    assert test.state_dict() == before
    assert test.verdict(0, PENALTY) is None and test.evidence(0) is None


@pytest.mark.parametrize("mean", [0.0, -PENALTY, -2 * PENALTY, -30.0])
def test_what_promises_a_verdict(mean):
    """The excess, or the whole of nu, against Student's bound of the last look's error."""
    test = SequentialTest(15, looks=4)
    level = 0.05 / 15 / 2 * 4 / (1 + 2 + 3 + 4)
    bound = stats.t.isf(level, BATCH_PRIOR + 15)
    error = max(PENALTY, abs(mean + PENALTY)) / bound
    for factor, expected in ((0.99, True), (1.01, False)):
        assert test.worthwhile(0, PENALTY, _flat(mean, 16 * (factor * error) ** 2)) is expected


def test_a_spent_attempt_asks_for_a_better_pilot():
    first, spent = SequentialTest(15), SequentialTest(15)
    for _ in range(2):
        spent.add(0, _flat(-PENALTY))
        spent.reset(0)
    bound = stats.t.isf(0.05 / 15 / 2 * 4 / (1 + 2 + 3 + 4), BATCH_PRIOR + 15)
    pilot = _flat(0.0, 16 * (0.99 * PENALTY / bound) ** 2)
    assert first.worthwhile(0, PENALTY, pilot) and not spent.worthwhile(0, PENALTY, pilot)


def test_batches_without_rows_are_worth_an_attempt():
    """A loss computed inside the model tells of no rows: the batches themselves must show it."""
    assert SequentialTest(15).worthwhile(0, PENALTY, Measurement(0.0, math.nan, math.nan, 0))


def test_differences_that_are_not_finite_decide_nothing():
    for bad in (math.nan, math.inf, -math.inf):
        test = SequentialTest(1)
        test.add(0, _flat(0.0))
        test.add(0, Measurement(bad, math.nan, math.nan, ROWS))
        assert test.verdict(0, PENALTY) is None


def test_the_state_is_restored():
    generator = np.random.default_rng(4)
    test = SequentialTest(15)
    for section in (0, 3):
        for _ in range(3):
            third = float(generator.standard_normal())
            test.add(section, Measurement(float(generator.standard_normal()), 0.5, third, ROWS))
    test.reset(3)
    other = SequentialTest(15)
    other.load_state_dict(test.state_dict())
    assert other.state_dict() == test.state_dict()
    assert other.batches(0) == 3 and other.batches(3) == 0
    assert other.evidence(0) == test.evidence(0)


def test_a_loaded_state_is_not_shared():
    """The run that goes on must not change the state that it was loaded from."""
    test = SequentialTest(15)
    test.add(0, _flat(0.1, 0.1))
    state = test.state_dict()
    other = SequentialTest(15)
    other.load_state_dict(state)
    other.add(0, _flat(0.2, 0.1))
    assert [found["mean"] for found in state["measurements"][0]] == [0.1]


@pytest.mark.parametrize(
    "theta, size, expected",
    [
        (0.0, 0.0, True),
        (0.02, 0.019, True),
        (0.03, 0.0, False),
        (0.0, 0.03, False),
        (1.0, 1.0, False),
    ],
)
def test_domain_of_attraction(theta, size, expected):
    """Both theta and the weights' root mean square must be small."""
    weights = [nn.Parameter(torch.full((3, 4), size)), nn.Parameter(torch.full((5,), -size))]
    assert in_domain_of_attraction(theta, weights, 0.02) is expected
    assert in_domain_of_attraction(torch.tensor(theta), weights, 0.02) is expected


def test_one_large_tensor_is_not_averaged_away_by_many_zeros():
    weights = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.full((100,), 0.1))]
    assert not in_domain_of_attraction(0.0, weights, 0.02)
