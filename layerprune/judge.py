"""The judge: which section is measured next, and what the measurement decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerprune.config import PruneConfig
from layerprune.elimination import SequentialTest, Verdict

Status = Literal["open", "settled", "eliminated"]

ROUNDING_BATCHES = 8
"""Batches on which an undecided section is rounded when learning is over."""


@dataclass(frozen=True)
class Event:
    """A decision about one section.

    Attributes:
        step: the training step at whose end it fell.
        section: the section's name.
        decision: ``"eliminated"``, ``"settled"``, ``"kept"`` (not eliminated, theta set back),
            ``"closed"`` (theta said it pays, the test does not: theta is set to 0 for a second test),
            ``"rounded-off"`` or ``"rounded-on"``.
        by: ``"test"``, ``"rounding"`` or ``"attraction"``.
        difference: C(on) - C(off) that it rests on; None for the attraction rule.
        standard_error: of the difference.
        batches: batches that the difference rests on.
        penalty: the section's nu; the section pays if the difference is below minus this.
        theta: keep probability when the decision fell.
    """

    step: int
    section: str
    decision: str
    by: str
    difference: float | None
    standard_error: float | None
    batches: int
    penalty: float
    theta: float


class Judge:
    """Measures one section at a time and decides about it.

    Args:
        count: sections in the run.
        config: the pruner's settings.
        recheck: steps after which a settled section is measured again; doubled each time.
    """

    def __init__(self, count: int, config: PruneConfig, recheck: int) -> None:
        self.test = SequentialTest(count, level=config.level, looks=config.looks)
        self.tolerance = config.tolerance
        self.reset_theta = max(0.5, config.theta_init)
        self.recheck = recheck
        self.current: int | None = None
        self.turn = [0] * count
        self.due = [0] * count
        self.settlings = [0] * count

    def choose(
        self, step: int, theta: Tensor, status: list[Status], learning: bool
    ) -> int | None:
        """The section to measure in this step, or None.

        While learning: those that theta says are decided, then those it leans to keep, then settled
        ones, whichever are due. Afterwards every section still open.
        """
        if self.current is not None:
            return self.current
        values = theta.tolist()
        still_open = [index for index, state in enumerate(status) if state == "open"]
        if learning:
            low, high = self.tolerance, 1 - self.tolerance
            groups = (
                [i for i in still_open if not low < values[i] < high],
                [i for i in still_open if values[i] >= 0.5],
                [i for i, state in enumerate(status) if state == "settled"],
            )
            groups = tuple([i for i in group if self.due[i] <= step] for group in groups)
        else:
            groups = (still_open,)
        for group in groups:
            if group:
                self.current = min(group, key=lambda i: (self.turn[i], values[i], i))
                self.turn[self.current] += 1
                return self.current
        return None

    def verdict(self, step: int, penalty: float, learning: bool) -> Verdict | None:
        """What the measurements of the current section say by now; None to go on measuring."""
        index = self.current
        if learning:
            if self.test.hopeless(index, penalty):
                self._put_off(index, step)
                return None
            found = self.test.verdict(index, penalty)
            if found is not None or self.test.batches(index) == 0:
                self.current = None
            return found
        if self.test.batches(index) < ROUNDING_BATCHES:
            return None
        return self.round(penalty)

    def round(self, penalty: float) -> Verdict | None:
        """The likelier of the two decisions about the current section, significant or not."""
        evidence = self.test.evidence(self.current)
        self.test.reset(self.current)
        self.current = None
        if evidence is None:
            return None
        useless = evidence.difference + penalty > 0
        return Verdict(useless, evidence.difference, evidence.standard_error, evidence.batches)

    def settle(self, index: int, step: int) -> None:
        """Notes that a section was confirmed, and when to look at it again: ever more rarely."""
        self.settlings[index] += 1
        self.due[index] = step + self.recheck * 2 ** self.settlings[index]

    def _put_off(self, index: int, step: int) -> None:
        self.test.reset(index)
        self.due[index] = step + self.recheck // 2
        self.current = None

    def begin_rounding(self) -> None:
        """Starts the measurements of undecided sections afresh."""
        if self.current is not None:
            self.test.reset(self.current)
        self.current = None

    def state_dict(self) -> dict:
        """The queue and the test's evidence."""
        return {
            "test": self.test.state_dict(),
            "current": self.current,
            "turn": list(self.turn),
            "due": list(self.due),
            "settlings": list(self.settlings),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.test.load_state_dict(state["test"])
        self.current = state["current"]
        self.turn, self.due = list(state["turn"]), list(state["due"])
        self.settlings = list(state["settlings"])
