"""What kept and eliminated sections are worth, against what they must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from study.grid import REFERENCE, REINSERTION
from study.statistics import select

SURE = 2
"""Standard errors beyond which a difference counts as known."""


@dataclass(frozen=True)
class Worth:
    """One section of one run.

    Attributes:
        section: its name.
        difference: the mean loss with it minus that without it.
        error: the difference's standard error.
        penalty: it pays if the difference is at most minus this.
    """

    section: str
    difference: float
    error: float
    penalty: float

    @property
    def excess(self) -> float:
        """By how much it fails to pay."""
        return self.difference + self.penalty

    @property
    def pays(self) -> bool:
        """As measured."""
        return self.excess <= 0

    @property
    def surely_pays(self) -> bool:
        """Beyond `SURE` standard errors."""
        return self.excess + SURE * self.error < 0

    @property
    def surely_fails(self) -> bool:
        """Beyond `SURE` standard errors."""
        return self.excess - SURE * self.error > 0


def kept(rows: Sequence[dict], task: str) -> list[Worth]:
    """Every section that the reference has kept, over its seeds."""
    return [
        Worth(name, *row["differences"][name], row["penalties"][name])
        for row in select(rows, task, REFERENCE).values()
        for name in row["kept"]
    ]


def put_back(rows: Sequence[dict], task: str) -> list[Worth]:
    """Every section that was eliminated and trained once more."""
    return [
        Worth(name, found["difference"], found["error"], found["penalty"])
        for row in select(rows, task, REINSERTION).values()
        for name, found in row["reinserted"].items()
    ]
