"""What the ranks' evidence of one step says together, and whether the ranks still agree."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from layerprune.elimination import Measurement
from layerprune.evidence import StepEvidence
from layerprune.ranks import Ranks
from layerprune.run import RunState

_FIELDS = ("digest", "batch", "drawn", "scaled", "skipped", "measured")
_FIELDS += ("rows", "mean", "second", "third")
"""What a rank says beside each section's sum of slopes and number of rows."""

_DIGEST_BYTES = 6
"""A float64 holds as many exactly."""


def digest(run: RunState) -> str:
    """A short name of all that the ranks must agree about: hexadecimal, 12 digits."""
    theta = run.bank.theta.numpy().tobytes()
    told = (
        run.step_count,
        run.learning_since,
        run.status,
        run.bank.seed,
        run.bank.draw_number,
        run.judge.current,
        run.config,
        run.schedule,
        [section.name for section in run.sections],
        run.penalty.tolist(),
    )
    found = hashlib.blake2b(theta + repr(told).encode(), digest_size=_DIGEST_BYTES)
    return found.hexdigest()


class Agreement:
    """Makes one step's evidence of all ranks into the evidence that each of them learns from.

    Theta's slope is the mean over the counted rows of all ranks, and a measurement is that of all
    their rows, as if they had been one batch. The decisions, which follow from nothing else, are
    the same on every rank.

    Args:
        run: the run of this rank.
        ranks: the ranks.
    """

    def __init__(self, run: RunState, ranks: Ranks) -> None:
        self._run = run
        self._ranks = ranks

    def pool(self, evidence: StepEvidence) -> StepEvidence:
        """The evidence of all ranks; they call it together.

        Raises:
            RuntimeError: if the ranks have come apart.
        """
        if self._ranks.count == 1:
            return evidence
        told = self._ranks.gather(self._message(evidence))
        said = dict(zip(_FIELDS, told.unbind(1), strict=False))
        self._check(said["digest"], evidence.step)
        heard = said["measured"].bool()
        self._check(said["measured"][heard], evidence.step)
        self._run.bank.widest = int(said["batch"].max())
        slope = counted = measurement = None
        if said["drawn"].any():
            slope, counted = _mean_slopes(*told[:, len(_FIELDS) :].sum(0).chunk(2))
        if heard.any():
            fields = ("rows", "mean", "second", "third")
            measurement = _together([said[field][heard].tolist() for field in fields])
        section = self._measured_on(said["measured"][heard])
        scaled, skipped = (bool(said[field].any()) for field in ("scaled", "skipped"))
        return StepEvidence(evidence.step, slope, counted, section, measurement, scaled, skipped)

    def _message(self, evidence: StepEvidence) -> Tensor:
        run, found = self._run, evidence.measurement
        moments = (0, 0.0, 0.0, 0.0) if found is None else _moments(found)
        sums = torch.zeros(2, len(run.sections), dtype=torch.float64, device="cpu")
        if evidence.slope is not None:
            sums[0] = evidence.slope.double().where(evidence.counted, 0).sum(1)
            sums[1] = evidence.counted.sum(1)
        head = (
            int(digest(run), 16),
            run.bank.widest,
            evidence.slope is not None,
            evidence.scaled,
            evidence.skipped,
            0 if found is None else evidence.section + 1,
            *moments,
        )
        return torch.cat((torch.tensor(head, dtype=torch.float64, device="cpu"), sums.flatten()))

    def _check(self, digests: Tensor, step: int) -> None:
        different = (digests != digests[:1]).nonzero().flatten().tolist()
        if different:
            raise RuntimeError(
                f"rank {different[0]}'s pruner is not that of rank 0 in step {step}: make the "
                "pruners alike on all ranks (model, strength, cost, config, seed), and call draw, "
                "step and load_state_dict on all of them alike"
            )

    @staticmethod
    def _measured_on(numbers: Tensor) -> int | None:
        return int(numbers[0]) - 1 if numbers.numel() else None


def _mean_slopes(sums: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows as were counted, each of which says what they say on average."""
    counted = torch.arange(max(1, int(rows.max())), device="cpu") < rows[:, None]
    mean = (sums / rows.clamp_min(1)).float()
    return mean[:, None].expand(counted.shape).contiguous(), counted


def _moments(found: Measurement) -> tuple[int, float, float, float]:
    """Rows, mean, and the sums of the rows' squared and cubed deviations."""
    count = found.rows
    squares = found.variance * count * (count - 1) if count > 1 else 0.0
    return count, found.mean, squares, found.third * count if count else 0.0


def _together(moments: list[list[float]]) -> Measurement:
    """The measurement of all rows (Pébay, 2008, equations 2.1 and 3.1 for two sets)."""
    count, mean, squares, cubes = 0.0, 0.0, 0.0, 0.0
    if not any(moments[0]):  # the ranks' losses say nothing of single rows
        return Measurement(sum(moments[1]) / len(moments[1]), math.nan, math.nan, 0)
    for more, other, second, third in zip(*moments, strict=True):
        total, away = count + more, other - mean
        if not more:
            continue
        cubes += third + away**3 * count * more * (count - more) / total**2
        cubes += 3 * away * (count * second - more * squares) / total
        squares += second + away**2 * count * more / total
        mean += away * more / total
        count = total
    variance = squares / (count - 1) / count if count > 1 else math.nan
    return Measurement(mean, variance, cubes / count, int(count))
