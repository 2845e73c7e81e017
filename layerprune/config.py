"""The pruner's settings, and the phases that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["warm-up", "learning", "cool-down"]


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How sections are judged. Shares are of ``total_steps``.

    Attributes:
        theta_init: keep probability of every section at the start.
        warm_up: share in which gates are drawn but theta is held, at the least. Warm-up goes on
            until some section is seen to pay: before that the network has learned nothing, and
            every section looks useless.
        warm_up_limit: share at which warm-up ends in any case.
        learning_end: share at which learning ends; a deterministic network trains from there on.
        horizon: share in which theta of a useless section falls from 1 to 0.
        noise_factor: bound c on the random walk's share of that way (4: a half; 16: a quarter).
        max_descending: how many sections may fall at one time; ``None`` for all.
        estimator: ``"path"``, or ``"taylor"``, the biased classical baseline.
        probe_budget: expected probes per row over all sections.
        confidence: width, in standard errors, of the bound below which a held section may rise.
        rule: ``"test"``, the sequential paired test, or ``"attraction"``, small theta and small
            weights.
        tolerance: theta counts as 0 or 1 within this; bound of the attraction rule.
        level: probability that a run eliminates any section that pays.
        looks: looks of a test, at 2, 4, 8, ... batches.
        min_rows: rows on which a branch that runs at all does so at the least; a smaller batch runs
            whole.
        row_multiple: multiple to which the number of running rows is padded.
        scheme: how gates are drawn, ``"systematic"`` or ``"independent"``.
    """

    # What set each default: the studies `small` and `defaults` of docs/performance.md, by the task.
    # The ResNet keeps 5 of 15 sections from 1/2 and 8 from 1, for twice the FLOPs, as accurate; the
    # MLP is better from 3/4 and from 1.
    theta_init: float = 0.5
    # Not varied: a share in which the statistics of slopes fill.
    warm_up: float = 0.03
    # 0.16 is worse by held-out loss on both tasks.
    warm_up_limit: float = 0.08
    # 0.25 and 0.6 differ from it by less than seeds do, on both tasks.
    learning_end: float = 0.4
    # 0.02 and 0.08 differ from it by less than seeds do on the ResNet.
    horizon: float = 0.04
    # 16 is worse by held-out loss and dearer on both tasks.
    noise_factor: float = 4.0
    # 2 is worse and dearer on both; 8 is no worse on the ResNet, and on the MLP keeps fewer
    # sections at a higher loss.
    max_descending: int | None = 4
    # "taylor" leaves more than half of the decisions to rounding, and is worse on the MLP.
    estimator: Literal["path", "taylor"] = "path"
    # 0.25 is worse by held-out loss on both tasks.
    probe_budget: float = 0.5
    # Not varied: one standard error.
    confidence: float = 1.0
    # The attraction rule needs weight decay on all of a branch: not for everyone.
    rule: Literal["test", "attraction"] = "test"
    # Not varied.
    tolerance: float = 0.02
    # Statisticians' habit; tests/test_elimination.py holds the test to it.
    level: float = 0.05
    # Not varied: 16 batches at the most.
    looks: int = 4
    # What batch statistics inside a branch need to be finite, twice.
    min_rows: int = 4
    # Padding costs rows; shapes that repeat pay on a GPU, which has not been measured.
    row_multiple: int = 1
    # "independent" is worse by held-out loss on both tasks.
    scheme: Literal["systematic", "independent"] = "systematic"

    def __post_init__(self) -> None:
        whole = ["looks", "min_rows", "row_multiple"]
        if self.max_descending is not None:
            whole.append("max_descending")
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}")
        if not (math.isfinite(self.noise_factor) and math.isfinite(self.confidence)):
            raise ValueError(
                "noise_factor and confidence must be finite, got "
                f"{self.noise_factor} and {self.confidence}"
            )
        unit = (
            "theta_init",
            "warm_up",
            "warm_up_limit",
            "learning_end",
            "horizon",
            "tolerance",
            "level",
        )
        for name in unit:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.warm_up <= self.warm_up_limit < self.learning_end:
            raise ValueError(
                "warm_up <= warm_up_limit < learning_end must hold, got "
                f"{self.warm_up}, {self.warm_up_limit} and {self.learning_end}"
            )
        if self.noise_factor < 0 or self.confidence < 0 or not 0 < self.probe_budget <= 1:
            raise ValueError(
                "noise_factor and confidence must be >= 0 and probe_budget in (0, 1], got "
                f"{self.noise_factor}, {self.confidence} and {self.probe_budget}"
            )
        if self.max_descending is not None and self.max_descending < 1:
            raise ValueError(
                f"max_descending must be at least 1 or None, got {self.max_descending}"
            )
        if self.looks < 1 or self.min_rows < 1 or self.row_multiple < 1:
            raise ValueError(
                "looks, min_rows and row_multiple must be at least 1, got "
                f"{self.looks}, {self.min_rows} and {self.row_multiple}"
            )
        choices = {
            "estimator": ("path", "taylor"),
            "rule": ("test", "attraction"),
            "scheme": ("systematic", "independent"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Schedule:
    """The phases in steps.

    Attributes:
        total_steps: steps of the whole run.
        warm_up_end: first step that may belong to learning.
        warm_up_limit: first step that belongs to learning in any case.
        learning_end: first step of cool-down.
        horizon: steps in which theta of a useless section falls from 1 to 0.
    """

    total_steps: int
    warm_up_end: int
    warm_up_limit: int
    learning_end: int
    horizon: int

    @classmethod
    def from_config(cls, config: PruneConfig, total_steps: int | None) -> Schedule:
        """Rounds the shares to steps.

        Raises:
            ValueError: if there are too few steps for the phases.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise ValueError(
                f"total_steps must be the number of training steps as an int, got {total_steps!r}"
            )
        warm_up_end = math.ceil(config.warm_up * total_steps)
        warm_up_limit = math.ceil(config.warm_up_limit * total_steps)
        learning_end = math.floor(config.learning_end * total_steps)
        if learning_end - warm_up_limit < 2 or total_steps - learning_end < 2:
            raise ValueError(
                f"total_steps = {total_steps} leaves fewer than 2 steps to learning or cool-down: "
                "train longer, or change warm_up and learning_end"
            )
        horizon = max(1, round(config.horizon * total_steps))
        return cls(total_steps, warm_up_end, warm_up_limit, learning_end, horizon)
