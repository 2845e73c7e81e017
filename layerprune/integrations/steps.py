"""What the adapters share: the pruner's step behind an optimizer's, its options, its metrics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch

from layerprune.optimizers import check_optimizer
from layerprune.pruner import LayerPruner, StepReport

_GIVEN = {"model", "example_inputs", "total_steps", "ema"}
"""Arguments of `LayerPruner` that are none of an adapter's options."""


class StepFollower:
    """Makes the pruner's step right behind the optimizer's, whoever calls that.

    By a hook on the optimizer: with a gradient scaler it runs between ``scaler.step`` and
    ``scaler.update``, where no callback is called.

    Args:
        pruner: the pruner.
        optimizer: torch's own, not what a library wrapped around it.
        scaler: the gradient scaler that steps it, or None.

    Attributes:
        accumulation: number that the loss of each micro-batch of the step to come is divided by.

    Raises:
        TypeError: if the optimizer cannot be compacted.
        ValueError: if it holds none of the model's parameters.
    """

    def __init__(
        self,
        pruner: LayerPruner,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        check_optimizer(pruner.model, optimizer)
        self.accumulation = 1
        self._pruner = pruner
        self._optimizer = optimizer
        self._scaler = scaler
        self._report: StepReport | None = None
        self._handle = optimizer.register_step_post_hook(self._follow)

    def _follow(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._report = self._pruner.step(optimizer, self._scaler, self.accumulation)

    def finish(self) -> StepReport:
        """The report of a step that is over by now, also if the scaler left it out."""
        report, self._report = self._report, None
        if report is None:
            report = self._pruner.step(
                self._optimizer, accumulation=self.accumulation, skipped=True
            )
        return report

    def close(self) -> None:
        """Takes the hook off the optimizer."""
        self._handle.remove()


def check_options(options: Mapping[str, object]) -> None:
    """Refuses what `LayerPruner` would not take, before there is one.

    Raises:
        TypeError: for an option that is unknown, or without ``strength``.
    """
    known = set(inspect.signature(LayerPruner).parameters) - _GIVEN
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}: the pruner's are {sorted(known)}")
    if "strength" not in options:
        raise TypeError("strength is missing: the loss that a section of mean cost must be worth")


def metrics(pruner: LayerPruner) -> dict[str, float]:
    """What is logged of a run: sections left, share of training operations saved, every theta."""
    sections = pruner.sections
    return {
        "layerprune/sections_alive": float(sum(s.status != "eliminated" for s in sections)),
        "layerprune/train_flops_saved": 1.0 - pruner.ledger.fraction,
    } | {f"layerprune/theta/{s.name}": s.theta for s in sections}
