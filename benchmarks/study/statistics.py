"""A study's runs by method, and what two methods differ by on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from study.grid import EPOCHS, FLOPS
from study.methods import METHODS

CONFIDENCE = 0.95
MARGIN = 0.005
"""Of accuracy, that a method may lose and still count as not inferior."""

Runs = dict[int, dict]
"""Rows by their seed."""


@dataclass(frozen=True)
class Comparison:
    """A mean difference with its Student-t interval, unbounded where there is one seed.

    Attributes:
        mean: of the differences.
        low: the interval's lower end.
        high: its upper end.
        seeds: how many differences there are.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def non_inferior(self) -> bool:
        """Whether a loss of `MARGIN` is excluded."""
        return self.low > -MARGIN

    @property
    def better(self) -> bool:
        """Whether no gain is excluded."""
        return self.low > 0


@dataclass(frozen=True)
class Group:
    """The runs of a method with a budget.

    Attributes:
        method: its name.
        budget: `EPOCHS` or `FLOPS`.
        runs: by their seed, at least one.
    """

    method: str
    budget: str
    runs: Runs

    @property
    def label(self) -> str:
        """How tables and figures name it."""
        return self.method + (" @ equal operations" if self.budget == FLOPS else "")


def select(
    rows: Sequence[dict], task: str, method: str, setting: str = "", budget: str = EPOCHS
) -> Runs:
    """The rows of one method, by their seed."""
    wanted = {"task": task, "method": method, "setting": setting, "budget": budget}
    return {row["seed"]: row for row in rows if row.items() >= wanted.items()}


def groups(rows: Sequence[dict], task: str) -> list[Group]:
    """All methods that a task has been trained by, in the order of `METHODS`."""
    found = [
        Group(method, budget, select(rows, task, method, budget=budget))
        for method in METHODS
        for budget in (EPOCHS, FLOPS)
    ]
    return [group for group in found if group.runs]


def mean(runs: Runs, key: str) -> float:
    """Over seeds."""
    return fmean(row[key] for row in runs.values())


def spread(runs: Runs, key: str) -> float | None:
    """The standard deviation over seeds, None of one."""
    return stdev(row[key] for row in runs.values()) if len(runs) > 1 else None


def compare(differences: Sequence[float]) -> Comparison:
    """What is known of the mean of differences."""
    count, middle = len(differences), fmean(differences)
    if count == 1:
        return Comparison(middle, -math.inf, math.inf, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = quantile * stdev(differences) / math.sqrt(count)
    return Comparison(middle, middle - half, middle + half, count)


def paired(first: Runs, second: Runs, key: str = "accuracy") -> Comparison | None:
    """The first's minus the second's on the seeds that both have, None if there is none."""
    seeds = sorted(first.keys() & second.keys())
    return compare([first[s][key] - second[s][key] for s in seeds]) if seeds else None


def ratio(first: Runs, second: Runs, key: str) -> float | None:
    """The first's over the second's, the mean over the seeds that both have."""
    seeds = first.keys() & second.keys()
    return fmean(first[s][key] / second[s][key] for s in seeds) if seeds else None
