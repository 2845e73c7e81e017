"""When a section may go: a sequential paired test, and the domain-of-attraction rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

BATCH_PRIOR = 32
"""Degrees of freedom by which the variance within batches stands in for the one between batches.

With two batches their own variance says almost nothing, while every batch holds many rows. Measured
on trained networks, the variance between batches is about 1.15 times the one their rows imply.
"""


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    tail = max(0.0, (1 - inside) / 2)
    return tail if t >= 0 else 1 - tail


SKEWNESS_FACTOR = 1.3
"""By how much the skewness of few rows falls short of the true one, in simulations."""


@dataclass(frozen=True)
class Measurement:
    """One batch's whole-section difference C(on) - C(off).

    Attributes:
        mean: the difference.
        variance: variance of that mean, from the spread of the batch's rows; NaN where the loss
            gave no rows to look at.
        third: third central moment of the rows; NaN likewise.
        rows: rows of the batch.
    """

    mean: float
    variance: float
    third: float
    rows: int

    @property
    def is_finite(self) -> bool:
        """Whether the difference is a number at all."""
        return math.isfinite(self.mean) and not math.isinf(self.variance)


@dataclass(frozen=True)
class Evidence:
    """What a section's measurements say together.

    Attributes:
        mean: estimate of the difference.
        error: its standard error.
        freedom: degrees of freedom of the error.
        skewness: of the rows.
        rows: rows behind the estimate.
    """

    mean: float
    error: float
    freedom: int
    skewness: float
    rows: int

    def tails(self, penalty: float) -> tuple[float, float]:
        """Chances of what was seen, or more, if the difference were just ``-penalty``.

        Returns:
            Of a difference as high, and of one as low.
        """
        excess = self.mean + penalty
        if self.error == 0:
            return (0.0, 1.0) if excess > 0 else (1.0, 0.0)
        score = plain = excess / self.error
        if self.rows:
            # A batch that happens to miss the few rows that need the section has a high mean and a
            # small spread at once. Hall's transformation (1992) takes that skewness out of the
            # statistic.
            a = SKEWNESS_FACTOR * self.skewness / (6 * math.sqrt(self.rows))
            score += a * (2 * score**2 + 1) + 4 / 3 * a**2 * score**3
        # Skewness may only make a section harder to eliminate: to the right, it is mostly noise.
        high, low = min(score, plain), max(score, plain)
        return student_tail(high, self.freedom), student_tail(-low, self.freedom)


def combine(measurements: Sequence[Measurement]) -> Evidence:
    """Combines measurements of one section.

    The variance between batches is moderated by the one within them (Smyth, 2004): a weighted mean
    with `BATCH_PRIOR` degrees of freedom for the latter.

    Args:
        measurements: at least one.
    """
    count = len(measurements)
    mean = sum(m.mean for m in measurements) / count
    squares = sum((m.mean - mean) ** 2 for m in measurements)
    within = [m for m in measurements if not math.isnan(m.variance)]
    freedom = (BATCH_PRIOR if within else 0) + count - 1
    if freedom == 0:
        return Evidence(mean, math.inf, 1, 0.0, 0)
    spread = skewness = 0.0
    if within:
        spread = BATCH_PRIOR * sum(m.variance for m in within) / len(within)
        row_variance = sum(m.variance * m.rows for m in within) / len(within)
        third = sum(m.third for m in within) / len(within)
        skewness = third / row_variance**1.5 if row_variance > 0 else 0.0
    error = math.sqrt((spread + squares) / freedom / count)
    return Evidence(mean, error, freedom, skewness, sum(m.rows for m in within))


@dataclass(frozen=True)
class Verdict:
    """What a look at the differences said.

    Attributes:
        useless: True if the section's loss difference is above ``-penalty``, False if below.
        difference: mean of C(on) - C(off).
        standard_error: of that mean.
        batches: batches it rests on.
    """

    useless: bool
    difference: float
    standard_error: float
    batches: int


class SequentialTest:
    """Decides whether Delta + nu is above or below zero, looking at 2, 4, 8, ... batches.

    The level of calling a needed section useless is spent over the sections of a run, over the
    ``attempts`` of a section (1/2, 1/4, ... of its share) and over the ``looks`` of an attempt as
    1 : 2 : 3 : ... (later ones see more and are nearer to their nominal level), so that by the
    union bound no more than ``level`` is spent in a run.

    Args:
        sections: sections in the run.
        level: probability of eliminating any section that pays, for the whole run.
        keep_level: level of one attempt for the opposite error, which only costs time.
        looks: looks per attempt; the last is at ``2**looks`` batches.
    """

    def __init__(
        self, sections: int, level: float = 0.05, keep_level: float = 0.05, looks: int = 4
    ) -> None:
        self.level = level / sections
        self.keep_level = keep_level
        self.looks = looks
        self._measurements: dict[int, list[Measurement]] = {}
        self._attempts: dict[int, int] = {}

    def add(self, section: int, measurement: Measurement) -> None:
        """Adds a batch's difference for a section."""
        self._measurements.setdefault(section, []).append(measurement)

    def batches(self, section: int) -> int:
        """Batches gathered in the section's present attempt."""
        return len(self._measurements.get(section, ()))

    def evidence(self, section: int) -> Evidence | None:
        """What is known so far, without any claim of significance; None before the first batch."""
        found = self._measurements.get(section)
        return combine(found) if found else None

    def worthwhile(self, section: int, penalty: float, pilot: Measurement) -> bool:
        """Whether an attempt promises a verdict, by a batch that will be no part of it.

        The last look must be able to tell from ``-penalty`` what the pilot saw, or no effect at
        all. Early in a run the loss differs too much from row to row for either.
        """
        error = combine([pilot]).error / math.sqrt(2**self.looks)
        excess = max(penalty, abs(pilot.mean + penalty))
        freedom = BATCH_PRIOR + 2**self.looks - 1
        if math.isnan(pilot.variance) or error == 0:
            return True
        return student_tail(excess / error, freedom) < self._level(section, self.looks)

    @staticmethod
    def looks_at(count: int) -> bool:
        """Whether the test looks at this number of batches."""
        return count >= 2 and count & (count - 1) == 0

    def verdict(self, section: int, penalty: float) -> Verdict | None:
        """The verdict of a look, or None between looks and while the test is undecided.

        A verdict ends the attempt. So does the last look: its evidence is dropped, since the
        network it speaks of is gone.
        """
        count = self.batches(section)
        if not self.looks_at(count):
            return None
        found = self.evidence(section)
        high, low = found.tails(penalty)
        look = count.bit_length() - 1
        useless = high < self._level(section, look)
        needed = low < self.keep_level / self.looks
        if useless or needed or count >= 2**self.looks:
            self.reset(section)
        if not (useless or needed):
            return None
        return Verdict(useless, found.mean, found.error, count)

    def _level(self, section: int, look: int) -> float:
        share = 2 * look / (self.looks * (self.looks + 1))
        return self.level * share / 2 ** (self._attempts.get(section, 0) + 1)

    def reset(self, section: int) -> None:
        """Ends the section's attempt."""
        if self._measurements.pop(section, None):
            self._attempts[section] = self._attempts.get(section, 0) + 1

    def state_dict(self) -> dict:
        """Gathered measurements and attempts."""
        return {
            "measurements": {
                index: [asdict(m) for m in found] for index, found in self._measurements.items()
            },
            "attempts": dict(self._attempts),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self._measurements = {
            index: [Measurement(**m) for m in found]
            for index, found in state["measurements"].items()
        }
        self._attempts = dict(state["attempts"])


def in_domain_of_attraction(
    theta: Tensor | float, weights: list[nn.Parameter], tolerance: float
) -> bool:
    """Whether theta and the branch's weights are both small.

    Under weight decay such a pair is drawn to (0, 0) (`docs/algorithm.md` has the proof), so the
    section can only vanish.

    Args:
        theta: keep probability.
        weights: the branch's parameters, BatchNorm's affine ones included.
        tolerance: bound on theta and on the root mean square of each parameter tensor.
    """
    if float(theta) > tolerance:
        return False
    return all(float(w.detach().float().square().mean()) <= tolerance**2 for w in weights)
