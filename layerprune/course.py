"""The course of a run: what a step's evidence leads to, and when a phase ends."""

from __future__ import annotations

from layerprune.config import Phase
from layerprune.decisions import apply_verdict, attracted
from layerprune.evidence import StepEvidence
from layerprune.learner import ThetaLearner
from layerprune.run import RunState


def learn(run: RunState, learner: ThetaLearner, evidence: StepEvidence | None) -> list[int]:
    """Learns from a step's evidence; returns the sections that it eliminates.

    Raises:
        FloatingPointError: if a gate's gradient was not finite, and no scaler accounts for it.
    """
    if evidence is not None:
        if not evidence.check():
            return []
        if evidence.slope is not None and run.phase != "cool-down":
            learner.move(evidence.slope, evidence.counted)
    learning = run.phase == "learning"
    if run.config.rule == "attraction" and learning:
        return attracted(run)
    index = run.judge.current
    if index is None or evidence is None or evidence.section != index:
        return []
    if not learning and evidence.step <= run.schedule.learning_end:
        return []  # rounding begins afresh
    verdict = run.judge.hear(evidence.measurement, run.step_count, learning)
    if verdict is None or not apply_verdict(run, learner, index, verdict):
        return []
    return [index]


def change_phase(run: RunState, learner: ThetaLearner, phase: Phase) -> None:
    """Ends the phase of a step that was counted, where its time has come.

    Args:
        run: the run.
        learner: its learner.
        phase: what the run was in before the step was counted.
    """
    if phase == "warm-up" and run.step_count >= run.schedule.warm_up_end:
        late = run.step_count >= run.schedule.warm_up_limit
        if late or learner.some_section_pays():
            run.learning_since = run.step_count
    if run.step_count == run.schedule.learning_end:
        run.judge.begin_rounding(len(run.where("open")), run.schedule.total_steps - run.step_count)
