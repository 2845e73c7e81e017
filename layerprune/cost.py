"""What a model costs: FLOPs per module, and the sections' shares by a measure of one's choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerprune.calls import Inputs, batch_size_of
from layerprune.dry_run import FEW, DryRuns


def forward_flops(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Floating-point operations of one row's forward, by module name ("" is the whole model).

    Counted by `torch.utils.flop_counter` (a multiplication and an addition are two operations).

    Raises:
        Exception: what the model raises, where it does not run with ``inputs``.
    """
    rows = batch_size_of(inputs)
    try:
        return _counted(model, inputs, rows, real=False)
    except Exception:
        return _counted(model, inputs, min(rows, FEW), real=True)


def _counted(model: nn.Module, inputs: Inputs, rows: int, real: bool) -> dict[str, float]:
    runs = DryRuns(model, inputs, real)
    with FlopCounterMode(display=False, custom_mapping=_FURTHER) as counter:
        runs.run(rows)
    root = type(model).__name__
    counts = {}
    for name, by_operation in counter.get_flop_counts().items():
        total = sum(by_operation.values()) / rows
        if name in ("Global", root):
            counts[""] = max(total, counts.get("", 0.0))
        elif name.startswith(f"{root}."):
            counts[name.removeprefix(f"{root}.")] = total
    return counts


def _grouped_mm_flops(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    """Of a mixture of experts' multiplication: every row by the matrix of its group."""
    return 2 * math.prod(left) * right[-1]


_FURTHER = {torch.ops.aten._grouped_mm: _grouped_mm_flops}
"""Operations that torch's counter leaves out."""


def relative_costs(
    cost: str | Mapping[str, float],
    names: Sequence[str],
    params: Sequence[int],
    flops: Sequence[float],
) -> Tensor:
    """What each section costs, by the measure asked for.

    Args:
        cost: ``"flops"``, ``"params"``, ``"uniform"``, or a mapping from section name to cost, as
            `latency.section_latencies` measures it.
        names: the sections' names.
        params: parameters of each branch.
        flops: operations of each branch.

    Returns:
        float32 ``[L]``.

    Raises:
        ValueError: if ``cost`` is none of these, or lacks a section.
    """
    if isinstance(cost, Mapping):
        missing = [name for name in names if name not in cost]
        if missing:
            raise ValueError(f"cost gives no value for section {missing[0]!r}")
        return torch.tensor([float(cost[name]) for name in names], device="cpu")
    measures = {"flops": flops, "params": params, "uniform": [1.0] * len(names)}
    if not isinstance(cost, str) or cost not in measures:
        raise ValueError(
            'cost must be "flops", "params", "uniform", "latency" or a mapping by section name, '
            f"got {cost!r}"
        )
    return torch.tensor([float(value) for value in measures[cost]], device="cpu")
