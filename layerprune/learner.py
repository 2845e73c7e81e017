"""How theta learns: evidence in, projected step out, probes shared for the next step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerprune import ops
from layerprune.ops.projected_step import STATISTICS, standard_error
from layerprune.run import RunState

PROBE_SHARE = 0.125
"""Probed share of a section's rows at the most."""

_WEAKENED = torch.tensor([0.5, 0.5, 0.5, 1.0, 0.5], device="cpu")
"""What is left of the statistics when the network has changed: half the weight, the same mean."""


class ThetaLearner:
    """Moves the keep probabilities of a run.

    Args:
        run: the run; its bank's theta and probe rates are written to.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run
        count = len(run.sections)
        self.statistics = torch.zeros(STATISTICS, count, device="cpu")
        self.in_play = torch.zeros(count, dtype=torch.bool, device="cpu")

    def move(self, slope: Tensor, counted: Tensor) -> None:
        """One projected SGD step; in warm-up only the statistics move.

        Args:
            slope: float32 ``[L, R]``, see `ops.projected_gate_step_`.
            counted: bool ``[L, R]``.
        """
        run = self._run
        learning = run.phase == "learning"
        movable = [learning and status == "open" for status in run.status]
        free = torch.tensor(movable, device="cpu")
        if run.judge.current is not None:
            free[run.judge.current] = False
        horizon = run.schedule.horizon
        ops.projected_gate_step_(
            run.bank.theta,
            self.statistics,
            self.in_play,
            slope,
            counted,
            run.penalty,
            free,
            horizon=horizon,
            noise_factor=run.config.noise_factor,
            decay=1 - 1 / (horizon + 1),
            confidence=run.config.confidence,
            max_descending=run.config.max_descending,
        )

    def some_section_pays(self) -> bool:
        """Whether the upper confidence bound of some section's slope + nu is below zero."""
        bound = self.statistics[3] + 2 * standard_error(self.statistics) + self._run.penalty
        return bool((bound < 0).any())

    def weaken(self) -> None:
        """The network is another one now: what is known of the sections counts half."""
        self.statistics.mul_(_WEAKENED[:, None])

    def forget(self, index: int) -> None:
        """Starts a section's statistics afresh."""
        self.statistics[:, index] = 0

    def allocate_probes(self) -> None:
        """Shares the next step's probe budget: sections in play first, the others by turns."""
        run = self._run
        rate = run.bank.probe_rate.zero_()
        if run.phase == "cool-down" or run.config.estimator == "taylor":
            return
        theta = run.bank.theta.tolist()
        playing, others = [], []
        for index in run.where("open"):
            if theta[index] > run.config.tolerance and index != run.judge.current:
                (playing if self.in_play[index] else others).append(index)
        budget = run.config.probe_budget
        if playing:
            share = min(PROBE_SHARE, 0.75 * budget / len(playing))
            rate[playing] = share
            budget -= share * len(playing)
        if others:
            # By turns, so that each one's rows are many at a time and rare.
            turns = math.ceil(len(others) * PROBE_SHARE / budget)
            rate[others[run.step_count % turns :: turns]] = PROBE_SHARE

    def state_dict(self) -> dict:
        """The running statistics and the sections in play."""
        return {"statistics": self.statistics.clone(), "in_play": self.in_play.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.statistics.copy_(state["statistics"])
        self.in_play.copy_(state["in_play"])
