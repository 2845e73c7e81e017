"""What a pruner tells: about its sections, and about what a step did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerprune.config import Phase
from layerprune.judge import Event, Status


@dataclass(frozen=True)
class SectionInfo:
    """One of the sections that the model started with.

    Attributes:
        name: the module's qualified name.
        kind: ``"residual"``, ``"twin"``, ``"opaque"`` or ``"branch"``.
        theta: keep probability.
        cost: cost by which its penalty was set, in units of the mean section's.
        penalty: nu, the loss difference that the section must be worth.
        status: ``"open"``, ``"settled"`` or ``"eliminated"``.
        parameters: parameters of its branch.
        flops: operations of one row's forward through its branch.
    """

    name: str
    kind: str
    theta: float
    cost: float
    penalty: float
    status: Status
    parameters: int
    flops: float


@dataclass(frozen=True)
class StepReport:
    """What one `LayerPruner.step` did.

    Attributes:
        step: the step's number, from 1.
        phase: the phase it belonged to.
        changed: whether the model and the optimizer were compacted.
        eliminated: names of the sections that left.
        events: all decisions that fell.
    """

    step: int
    phase: Phase
    changed: bool
    eliminated: tuple[str, ...]
    events: tuple[Event, ...]


def table(
    sections: tuple[SectionInfo, ...],
    left_out: Mapping[str, str],
    dropped: Mapping[str, float],
) -> str:
    """The sections, one a line, in plain text; and what else has a say in the model's depth.

    Args:
        sections: of a pruner.
        left_out: why blocks have no gate, by name.
        dropped: rates of the model's own stochastic depth, by name.
    """
    width = max(len(info.name) for info in sections)
    lines = [f"{'section':<{width}}  theta  penalty  status"]
    lines += [
        f"{info.name:<{width}}  {info.theta:5.2f}  {info.penalty:7.4f}  {info.status}"
        for info in sections
    ]
    lines += [f"{name or 'the model'} has no gate: {why}" for name, why in left_out.items()]
    if dropped:
        name, rate = max(dropped.items(), key=lambda item: item[1])
        lines.append(
            f"the model has stochastic depth of its own, up to {rate:.0%} ({name}): "
            "layerprune.replace_stochastic_depth sets it to 0"
        )
    return "\n".join(lines)


def absent(structure: Mapping[str, Any]) -> list[str]:
    """Names of the sections that evaluation does not run: eliminated, or theta below 1/2."""
    closed = [
        part["name"]
        for part in structure["sections"]
        if part["status"] == "open" and part["theta"] < 0.5
    ]
    return [*structure["eliminated"], *(n for n in closed if n not in structure["eliminated"])]
