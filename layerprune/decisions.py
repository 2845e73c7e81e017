"""What follows from a verdict: a section's status, its theta, and an event that says why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerprune.elimination import Verdict, in_domain_of_attraction
from layerprune.judge import Event
from layerprune.learner import ThetaLearner
from layerprune.run import RunState


def apply_verdict(run: RunState, learner: ThetaLearner, index: int, verdict: Verdict) -> bool:
    """Acts on a verdict about one section.

    Returns:
        Whether the section is to leave the model.
    """
    learning = run.phase == "learning"
    low = float(run.bank.theta[index]) <= run.config.tolerance
    if not learning:
        decision = "rounded-off" if verdict.useless else "rounded-on"
    elif verdict.useless:
        decision = "eliminated" if low else "closed"
    else:
        decision = "kept" if low else "settled"
    _record(run, index, decision, "test" if learning else "rounding", verdict)
    if decision in ("eliminated", "rounded-off"):
        return True
    if decision in ("settled", "rounded-on"):
        run.status[index] = "settled"
        run.bank.theta[index] = 1.0
        run.bank.gates[index].draw = None
        run.judge.settle(index, run.step_count)
    else:
        run.status[index] = "open"
        run.bank.theta[index] = 0.0 if decision == "closed" else 0.5
        learner.forget(index)
    return False


def round_by_theta(run: RunState, leaving: list[int]) -> list[int]:
    """Rounds what a cool-down too short for measurements left open, as evaluation would have it.

    Args:
        run: the run, in its last step.
        leaving: sections that leave the model in this step anyway.

    Returns:
        The sections to leave the model too.
    """
    gone = []
    for index in run.where("open"):
        if index in leaving:
            continue
        kept = float(run.bank.theta[index]) >= 0.5
        _record(run, index, "rounded-on" if kept else "rounded-off", "rounding", None)
        if kept:
            run.status[index] = "settled"
            run.bank.theta[index] = 1.0
        else:
            gone.append(index)
    return gone


def attracted(run: RunState) -> list[int]:
    """The open sections in the domain of attraction of (0, 0), each with its event recorded."""
    gone = [
        index
        for index in run.where("open")
        if in_domain_of_attraction(
            float(run.bank.theta[index]),
            run.sections[index].branch_parameters(),
            run.config.tolerance,
        )
    ]
    for index in gone:
        _record(run, index, "eliminated", "attraction", None)
    return gone


def check_decay(run: RunState, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """The attraction rule rests on weight decay of everything in a branch.

    Raises:
        ValueError: if a parameter of a branch is not decayed.
    """
    decayed = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group.get("weight_decay", 0) > 0
        for parameter in group["params"]
    }
    for section in (run.sections[index] for index in run.where("open")):
        if any(id(parameter) not in decayed for parameter in section.branch_parameters()):
            raise ValueError(
                f'rule="attraction" needs weight decay on every parameter of section '
                f"{section.name!r}, BatchNorm's included; give the optimizer a "
                "weight_decay, or use "
                'rule="test"'
            )


def _record(run: RunState, index: int, decision: str, by: str, verdict: Verdict | None) -> None:
    run.events.append(
        Event(
            run.step_count + 1,
            run.sections[index].name,
            decision,
            by,
            verdict and verdict.difference,
            verdict and verdict.standard_error,
            verdict.batches if verdict else 0,
            float(run.penalty[index]),
            float(run.bank.theta[index]),
        )
    )
