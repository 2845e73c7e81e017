"""What training steps say about the sections, between the backward and the step that learns of it.

On an accelerator the host runs ahead: when `LayerPruner.step` is called, the backward has only been
queued. Evidence therefore is learnt from one step later, when it has come over without anybody
having waited for it; on every device, so that runs agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from layerprune.difference import PendingMeasurement
from layerprune.elimination import Measurement
from layerprune.gradients import GateGradients
from layerprune.transfer import HostCopy

EVIDENCE_LAG = 1
"""Steps by which what is learnt lags what is trained.

A draw is made before the step that trains on it, so that it knows of the steps up to the one before
the last.
"""


@dataclass(frozen=True)
class StepEvidence:
    """What one training step said.

    Attributes:
        step: the step's number, from 1.
        slope: float32 ``[L, R]``, see `ops.projected_gate_step_`; None where nothing was drawn.
        counted: bool ``[L, R]``; likewise.
        section: the section measured by whole, or None.
        measurement: its measurement.
        scaled: whether a gradient scaler answers for what is not finite.
        skipped: whether the scaler skipped the optimizer's step.
    """

    step: int
    slope: Tensor | None
    counted: Tensor | None
    section: int | None
    measurement: Measurement | None
    scaled: bool
    skipped: bool

    @property
    def is_finite(self) -> bool:
        """Whether all of it are numbers at all."""
        slopes = self.slope is None or bool(self.slope.isfinite().all())
        return slopes and (self.measurement is None or self.measurement.is_finite)

    def check(self) -> bool:
        """Whether it may be learnt from: not that of a step that was, or had to be, skipped.

        Raises:
            FloatingPointError: if it is not finite and no scaler answers for that.
        """
        finite = self.is_finite
        if not (finite or self.scaled):
            raise FloatingPointError(
                f"a gate's gradient is not finite in step {self.step}: the loss or the model's "
                "outputs overflowed"
            )
        return finite and not self.skipped

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> StepEvidence:
        """The evidence that `dataclasses.asdict` made the fields of."""
        found = fields["measurement"]
        measurement = None if found is None else Measurement(**found)
        tensors = {name: fields[name] for name in ("slope", "counted")}
        here = {name: None if value is None else value.cpu() for name, value in tensors.items()}
        return cls(**{**fields, **here, "measurement": measurement})


class PendingEvidence:
    """What one training step said, on its way to the host.

    Args:
        step: the step's number, from 1.
        gradients: gate gradients of the step's draws, or None.
        measured: the measurement of a whole section, or None.
        rows_factor: what turns dC/dgate of a row into the derivative of the row's own loss, by
            batch size.
        optimizers: the optimizers, which have stepped.
        scaler: the gradient scaler that the losses were scaled by, or None.
        accumulation: number that each micro-batch's loss was divided by.
        skipped: whether the optimizer's step was left out, where no scaler tells.
    """

    def __init__(
        self,
        step: int,
        gradients: GateGradients | None,
        measured: PendingMeasurement | None,
        rows_factor: Callable[[int], float],
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        accumulation: int,
        skipped: bool = False,
    ) -> None:
        self.section = None if measured is None else measured.section
        self._step = step
        self._gradients = gradients
        self._measured = measured
        self._rows_factor = rows_factor
        self._accumulation = accumulation
        self._skipped = skipped
        # Of a step that was left out anyway nothing need be finite.
        self._scaled = skipped or (scaler is not None and scaler.is_enabled())
        scale, overflows = [], []
        if not skipped and self._scaled:
            # `scaler.get_scale()` would wait for the device, as would any public way of asking
            # whether it skipped the step.
            some = next(p for o in optimizers for group in o.param_groups for p in group["params"])
            scale = [scaler.scale(torch.ones((), device=some.device))]
            # Copies: the scaler adds up in place what other optimizers found.
            overflows = [
                n.clone() for o in optimizers for n in scaler._found_inf_per_device(o).values()
            ]
        self._scaling = HostCopy([*scale, *overflows])

    def arrive(self) -> StepEvidence:
        """The evidence, which is waited for."""
        scale, *overflows = [float(number) for number in self._scaling.get()] or [1.0]
        divisor = scale / self._accumulation
        slope = counted = measurement = None
        if self._gradients is not None:
            slope, counted = self._gradients.evidence(self._rows_factor, divisor)
        if self._measured is not None:
            measurement = self._measured.get(divisor)
        skipped = self._skipped or any(overflows)
        return StepEvidence(
            self._step, slope, counted, self.section, measurement, self._scaled, skipped
        )


Pool = Callable[[StepEvidence], StepEvidence]
"""Makes one rank's evidence of a step that of all ranks."""


class EvidenceQueue:
    """The evidence of the last steps that is not learnt from yet."""

    def __init__(self) -> None:
        self._waiting: deque[PendingEvidence | StepEvidence] = deque()

    def put(self, evidence: PendingEvidence) -> None:
        """Adds a step's evidence."""
        self._waiting.append(evidence)

    def take(self, pool: Pool) -> StepEvidence | None:
        """The evidence whose turn it is; None in the first steps."""
        if len(self._waiting) <= EVIDENCE_LAG:
            return None
        return _arrived(self._waiting.popleft(), pool)

    def settle(self, pool: Pool) -> None:
        """Waits for all of it: what a saved state keeps is the same on all ranks."""
        self._waiting = deque(_arrived(evidence, pool) for evidence in self._waiting)

    def measurements_of(self, section: int | None) -> int:
        """How many measurements of a section are waiting."""
        return sum(
            section is not None and evidence.section == section for evidence in self._waiting
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """All of it, which has to be settled.

        Raises:
            FloatingPointError: if some of it is not finite: a run could not go on from it.
        """
        for evidence in self._waiting:
            evidence.check()
        return [asdict(evidence) for evidence in self._waiting]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` returned."""
        self._waiting = deque(StepEvidence.from_dict(fields) for fields in state)


def _arrived(evidence: PendingEvidence | StepEvidence, pool: Pool) -> StepEvidence:
    return evidence if isinstance(evidence, StepEvidence) else pool(evidence.arrive())
