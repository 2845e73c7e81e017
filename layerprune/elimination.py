"""When a section may go: a sequential test on paired differences, and the domain-of-attraction rule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

BATCH_PRIOR = 32
"""Degrees of freedom by which the variance within batches stands in for the one between batches.

With two batches their own variance says almost nothing, while every batch holds many rows.
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


@dataclass
class PairedDifferences:
    """Whole-section differences C(on) - C(off) of one section, one per batch.

    Attributes:
        means: a batch's difference.
        variances: the variance of that mean, from the spread of the batch's rows; NaN where the loss
            gave no rows to look at.
        rows: rows the differences rest on.
    """

    means: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)
    rows: int = 0

    def add(self, mean: float, variance: float, rows: int) -> None:
        """Adds one batch."""
        self.means.append(mean)
        self.variances.append(variance)
        self.rows += rows

    @property
    def mean(self) -> float:
        """The estimate of the section's difference."""
        return sum(self.means) / len(self.means)

    def moderated(self) -> tuple[float, int]:
        """Standard error of the mean and its degrees of freedom.

        The variance between batches, moderated by the one within them (Smyth, 2004): a weighted mean
        with `BATCH_PRIOR` degrees of freedom for the latter.
        """
        count = len(self.means)
        mean = self.mean
        squares = sum((value - mean) ** 2 for value in self.means)
        within = [value for value in self.variances if not math.isnan(value)]
        prior = BATCH_PRIOR if within else 0
        spread = prior * sum(within) / len(within) if within else 0.0
        freedom = prior + count - 1
        if freedom == 0:
            return math.inf, 1
        return math.sqrt((spread + squares) / freedom / count), freedom


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
    ``attempts`` of a section (1/2, 1/4, ... of its share) and evenly over the ``looks`` of an attempt, so
    that by the union bound no more than ``level`` is spent in a run.

    Args:
        sections: sections in the run.
        level: probability of eliminating any section that pays, for the whole run.
        keep_level: level of one attempt for the opposite error, which only costs time.
        looks: looks per attempt; the last is at ``2**looks`` batches.
    """

    def __init__(
        self, sections: int, level: float = 0.05, keep_level: float = 0.05, looks: int = 5
    ) -> None:
        self.level = level / sections
        self.keep_level = keep_level
        self.looks = looks
        self._differences: dict[int, PairedDifferences] = {}
        self._attempts: dict[int, int] = {}

    def add(self, section: int, mean: float, variance: float, rows: int) -> None:
        """Adds a batch's difference for a section."""
        self._differences.setdefault(section, PairedDifferences()).add(mean, variance, rows)

    def batches(self, section: int) -> int:
        """Batches gathered in the section's present attempt."""
        found = self._differences.get(section)
        return len(found.means) if found else 0

    def evidence(self, section: int) -> Verdict | None:
        """What is known so far, without any claim of significance; None before the first batch."""
        found = self._differences.get(section)
        if found is None:
            return None
        error, _ = found.moderated()
        return Verdict(found.mean > 0, found.mean, error, len(found.means))

    def hopeless(self, section: int, penalty: float) -> bool:
        """Whether the last look would tell nothing, neither for what was seen nor for no effect at all.

        Early in a run the loss differs too much from row to row, and measuring is better put off. Such a
        stop can eliminate nothing, so it costs no level.
        """
        found = self._differences.get(section)
        if found is None:
            return False
        error, freedom = found.moderated()
        final = error * math.sqrt(len(found.means) / 2**self.looks)
        excess = max(penalty, abs(found.mean + penalty))
        return final > 0 and student_tail(excess / final, freedom) > self._level(section)

    def verdict(self, section: int, penalty: float) -> Verdict | None:
        """The verdict of a look, or None between looks and while the test is undecided.

        A verdict ends the attempt. So does the last look: its evidence is dropped, since the network it
        speaks of is gone.
        """
        found = self._differences.get(section)
        count = len(found.means) if found else 0
        if count < 2 or count & (count - 1):
            return None
        error, freedom = found.moderated()
        excess = found.mean + penalty
        score = excess / error if error > 0 else math.copysign(math.inf, excess)
        useless = student_tail(score, freedom) < self._level(section)
        needed = student_tail(-score, freedom) < self.keep_level / self.looks
        if not (useless or needed):
            if count >= 2**self.looks:
                self.reset(section)
            return None
        self.reset(section)
        return Verdict(useless, found.mean, error, count)

    def _level(self, section: int) -> float:
        return self.level / 2 ** (self._attempts.get(section, 0) + 1) / self.looks

    def reset(self, section: int) -> None:
        """Ends the section's attempt; one without a single look is not counted."""
        found = self._differences.pop(section, None)
        if found is not None and len(found.means) > 1:
            self._attempts[section] = self._attempts.get(section, 0) + 1

    def state_dict(self) -> dict:
        """Gathered differences and attempts."""
        return {
            "differences": {index: asdict(found) for index, found in self._differences.items()},
            "attempts": dict(self._attempts),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self._differences = {
            index: PairedDifferences(**found) for index, found in state["differences"].items()
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
        tolerance: bound on theta and on the weights' root mean square.
    """
    count = sum(weight.numel() for weight in weights)
    squares = sum(float(torch.linalg.vector_norm(weight.detach().float())) ** 2 for weight in weights)
    return float(theta) <= tolerance and (squares / max(count, 1)) ** 0.5 <= tolerance
