"""Where a pruning run stands: what its forwards and its steps share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerprune.brief import brief
from layerprune.config import Phase, PruneConfig, Schedule
from layerprune.evidence import EvidenceQueue
from layerprune.gates import GateBank
from layerprune.judge import Event, Judge, Status
from layerprune.ledger import Ledger
from layerprune.saved_state import check_progress, check_settings
from layerprune.sections import Section

FORMAT = 3
"""Version of `RunState.state_dict`."""


@dataclass
class RunState:
    """A run's sections and all that is known and decided about them.

    Attributes:
        sections: all sections that the model started with.
        config: the pruner's settings.
        schedule: the phases in steps.
        penalty: float32 ``[L]``, nu.
        bank: the gates, theta and the random stream.
        judge: the decision tests.
        status: what became of each section.
        measured: whether the penalties rest on a measurement, which no two runs agree in.
        evidence: what the last steps said and is not learnt from yet.
        step_count: steps done.
        learning_since: the step at which theta began to move; None before.
        events: the decisions, in their order.
        ledger: what the run has spent.
    """

    sections: list[Section]
    config: PruneConfig
    schedule: Schedule
    penalty: Tensor
    bank: GateBank
    judge: Judge
    status: list[Status]
    measured: bool = False
    evidence: EvidenceQueue = field(default_factory=EvidenceQueue)
    step_count: int = 0
    learning_since: int | None = None
    events: list[Event] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def phase(self) -> Phase:
        """The phase of the step to come."""
        if self.step_count >= self.schedule.learning_end:
            return "cool-down"
        return "warm-up" if self.learning_since is None else "learning"

    def where(self, status: Status) -> list[int]:
        """Indices of the sections of a status."""
        return [index for index, state in enumerate(self.status) if state == status]

    def state_dict(self) -> dict:
        """All but the learner's statistics; loads under ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "names": [section.name for section in self.sections],
            "total_steps": self.schedule.total_steps,
            "step_count": self.step_count,
            "learning_since": self.learning_since,
            "status": list(self.status),
            "penalty": self.penalty.clone(),
            "measured": self.measured,
            "config": asdict(self.config),
            "bank": self.bank.state_dict(),
            "judge": self.judge.state_dict(),
            "evidence": self.evidence.state_dict(),
            "events": [asdict(event) for event in self.events],
            "ledger": asdict(self.ledger),
        }

    def check(self, state: Any) -> None:
        """Refuses a state that cannot be restored here; nothing is changed.

        Raises:
            ValueError: if the state is damaged, or of another format, model or schedule, or this
                run has begun.
        """
        names = [section.name for section in self.sections]
        found = state.get("format") if isinstance(state, dict) else state
        if type(found) is not int or found != FORMAT:
            raise ValueError(
                f"this pruner state has format {brief(found)}, this version reads {FORMAT}"
            )
        check_settings(state)
        if state["names"] != names:
            raise ValueError(
                f"the state speaks of {len(state['names'])} sections "
                f"({brief(state['names'][:2])}...), the "
                f"model has {len(names)} ({names[:2]}...): it belongs to another model"
            )
        if state["total_steps"] != self.schedule.total_steps:
            raise ValueError(
                f"the state is of a run of {state['total_steps']} steps, this pruner was made for "
                f"{self.schedule.total_steps}"
            )
        if self.step_count:
            raise ValueError("load the state into a pruner freshly made on the dense model")
        if not self._has_penalty(state) or state["config"] != asdict(self.config):
            raise ValueError(
                "the state is of a run with another strength, cost or configuration than this one"
            )
        check_progress(state)

    def _has_penalty(self, state: dict) -> bool:
        """Whether a state's penalties are this run's, or measured ones of the same strength."""
        saved = state["penalty"].cpu()
        if self.measured != state.get("measured", False):  # states of older versions are not
            return False
        if not self.measured:
            return torch.equal(saved, self.penalty)
        alike = saved.shape == self.penalty.shape and saved.dtype == self.penalty.dtype
        return (
            alike
            and bool((saved > 0).all())
            and torch.allclose(saved.mean(), self.penalty.mean(), rtol=1e-5)
        )

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned, of a state that `check` takes.

        Penalties that were measured are the state's afterwards: the run goes on by the ones that
        its decisions so far rest on.

        Raises:
            ValueError: as `check`.
        """
        self.check(state)
        self.step_count = state["step_count"]
        self.learning_since = state["learning_since"]
        self.status[:] = state["status"]
        self.penalty.copy_(state["penalty"])
        self.judge.penalty = self.penalty.tolist()
        self.bank.load_state_dict(state["bank"])
        self.judge.load_state_dict(state["judge"])
        self.evidence.load_state_dict(state["evidence"])
        self.events[:] = [Event(**event) for event in state["events"]]
        self.ledger = Ledger(**state["ledger"])
