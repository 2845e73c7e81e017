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


def left(rows: Sequence[dict], task: str, method: str = REFERENCE) -> list[Worth]:
    """Every section that a method's networks have at the end, over its seeds.

    What it must be worth is the reference's penalty.
    """
    reference = select(rows, task, REFERENCE)
    return [
        Worth(name, *row["differences"][name], reference[seed]["penalties"][name])
        for seed, row in select(rows, task, method).items()
        if seed in reference
        for name in row["kept"]
    ]


def put_in(rows: Sequence[dict], task: str, kept: bool) -> list[Worth]:
    """Every section that was put in with fresh weights and trained.

    Args:
        rows: a study's.
        task: one of its tasks.
        kept: those that the reference keeps, or those that it eliminates.
    """
    return [
        Worth(name, found["difference"], found["error"], found["penalty"])
        for row in select(rows, task, REINSERTION).values()
        for name, found in row["reinserted"].items()
        if found["kept"] == kept
    ]
