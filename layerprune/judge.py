"""The judge: which section is measured next, and what the measurement decides."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch import Tensor

from layerprune.config import PruneConfig
from layerprune.elimination import Measurement, SequentialTest, Verdict
from layerprune.evidence import EVIDENCE_LAG

Status = Literal["open", "settled", "eliminated"]

ROUNDING_BATCHES = 8
"""Batches on which an undecided section is rounded when learning is over, at the most."""


LEANING = 0.75
"""Theta from which on a section is measured, if nothing else is to do, without waiting for 1."""


@dataclass(frozen=True)
class Event:
    """A decision about one section.

    Attributes:
        step: the training step at whose end it fell.
        section: the section's name.
        decision: ``"eliminated"``, ``"settled"``, ``"kept"`` (not eliminated, theta set back),
            ``"closed"`` (theta said it pays, the test does not: theta is set to 0 for a second
            test), ``"rounded-off"`` or ``"rounded-on"``.
        by: ``"test"``, ``"rounding"`` or ``"attraction"``.
        difference: C(on) - C(off) that it rests on; None for the attraction rule, and for sections
            rounded by theta in the run's last step.
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

    def __str__(self) -> str:
        told = f"step {self.step}: {self.section} {self.decision.replace('-', ' ')}"
        if self.by != "rounding":  # the decision says so
            told += f" by {self.by}"
        if self.difference is None:
            return told
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{told}, worth {-self.difference:+.4f}{error} (needed: {self.penalty:.4f})"


class Judge:
    """Measures one section at a time and decides about it.

    An attempt begins where the newest measurement says that it promises a verdict; else a single
    pilot batch is measured now and then, which is no part of any attempt.

    Args:
        penalty: float32 ``[L]``, what each section must be worth.
        config: the pruner's settings.
        recheck: steps after which a settled section is measured again; doubled each time.
    """

    def __init__(self, penalty: Tensor, config: PruneConfig, recheck: int) -> None:
        count = penalty.shape[0]
        self.penalty = penalty.tolist()
        self.test = SequentialTest(count, level=config.level, looks=config.looks)
        self.tolerance = config.tolerance
        self.recheck = recheck
        self.current: int | None = None
        self.piloting = False
        self.newest: Measurement | None = None
        self.next_pilot = 0
        self.rounding_batches = 0
        self.turn = [0] * count
        self.due = [0] * count
        self.settlings = [0] * count

    def choose(
        self, step: int, theta: Tensor, status: list[Status], learning: bool, awaited: int = 0
    ) -> int | None:
        """The section to measure in this step, or None.

        While learning: those that theta says are decided, then those it leans to keep, then settled
        ones, whichever are due. Afterwards every section still open. Where measurements that are
        not heard yet may decide about the current section, nothing is measured meanwhile.

        Args:
            step: steps done.
            theta: float32 ``[L]``.
            status: of every section.
            learning: whether learning goes on.
            awaited: measurements of the current section that were made and not heard.
        """
        if self.current is not None:
            return None if awaited and self._decides(awaited, learning) else self.current
        for group in self._groups(step, theta.tolist(), status, learning):
            if group:
                index = min(group, key=lambda i: (self.turn[i], float(theta[i]), i))
                return self._start(index, step, learning)
        return None

    def _decides(self, awaited: int, learning: bool) -> bool:
        """Whether so many measurements more may end what the current section is measured for."""
        count = self.test.batches(self.current) + awaited
        if not learning:
            return count >= self.rounding_batches
        return self.piloting or self.test.looks_at(count)

    def _groups(
        self, step: int, theta: list[float], status: list[Status], learning: bool
    ) -> list[list[int]]:
        still_open = [index for index, state in enumerate(status) if state == "open"]
        if not learning:
            return [still_open]
        low, high = self.tolerance, 1 - self.tolerance
        groups = (
            [i for i in still_open if not low < theta[i] < high],
            [i for i in still_open if theta[i] >= LEANING],
            [i for i, state in enumerate(status) if state == "settled"],
        )
        return [[i for i in group if self.due[i] <= step] for group in groups]

    def _start(self, index: int, step: int, learning: bool) -> int | None:
        promising = self.newest is not None and self._no_effect_shows(index)
        self.piloting = learning and not promising
        if self.piloting and step < self.next_pilot:
            return None
        self.current = index
        self.turn[index] += 1
        return index

    def _no_effect_shows(self, index: int) -> bool:
        """Whether a section without effect would show, if its rows spread like the newest ones."""
        penalty = self.penalty[index]
        silent = replace(self.newest, mean=0.0)
        return self.test.worthwhile(index, penalty, silent)

    def hear(self, measurement: Measurement, step: int, learning: bool) -> Verdict | None:
        """Takes the current section's measurement; returns a verdict when there is one."""
        index = self.current
        penalty = self.penalty[index]
        self.newest = measurement
        if self.piloting:
            self.piloting = False
            if not self.test.worthwhile(index, penalty, measurement):
                self.current = None
                self.due[index] = step + self.recheck // 2
                self.next_pilot = step + self.recheck // 8
            return None
        self.test.add(index, measurement)
        if not learning:
            return self._round(penalty)
        found = self.test.verdict(index, penalty)
        if found is not None or self.test.batches(index) == 0:
            self.current = None
        return found

    def _round(self, penalty: float) -> Verdict | None:
        """The likelier of the two decisions about the current section, significant or not."""
        index, count = self.current, self.test.batches(self.current)
        if count < self.rounding_batches:
            return None
        found = self.test.evidence(index)
        self.test.reset(index)
        self.current = None
        return Verdict(found.mean + penalty > 0, found.mean, found.error, count)

    def settle(self, index: int, step: int) -> None:
        """Notes that a section was confirmed, and when to look at it again: ever more rarely."""
        self.settlings[index] += 1
        self.due[index] = step + self.recheck * 2 ** self.settlings[index]

    def begin_rounding(self, undecided: int, steps: int) -> None:
        """Starts the measurements of undecided sections afresh.

        They take half of the steps left, where there are enough. A section's verdict falls when its
        last measurement is heard.
        """
        if self.current is not None:
            self.test.reset(self.current)
        self.current, self.piloting = None, False
        affordable = steps // (2 * max(undecided, 1)) - EVIDENCE_LAG
        self.rounding_batches = max(1, min(ROUNDING_BATCHES, affordable))

    def state_dict(self) -> dict:
        """The queue and the test's evidence."""
        return {
            "test": self.test.state_dict(),
            "current": self.current,
            "piloting": self.piloting,
            "newest": self.newest and asdict(self.newest),
            "next_pilot": self.next_pilot,
            "rounding_batches": self.rounding_batches,
            "turn": list(self.turn),
            "due": list(self.due),
            "settlings": list(self.settlings),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.test.load_state_dict(state["test"])
        self.newest = Measurement(**state["newest"]) if state["newest"] else None
        self.current, self.piloting = state["current"], state["piloting"]
        self.next_pilot, self.rounding_batches = state["next_pilot"], state["rounding_batches"]
        self.turn, self.due = list(state["turn"]), list(state["due"])
        self.settlings = list(state["settlings"])
