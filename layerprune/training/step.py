"""One training step: from a batch to new weights, theta, average and learning rate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerprune.judge import Event
from layerprune.training.assembly import precision
from layerprune.training.session import Session

__all__ = ["StepOutcome", "TrainStep"]


@dataclass(frozen=True)
class StepOutcome:
    """What came of a step.

    Attributes:
        loss: scalar on the device, mean over this rank's images of the step.
        correct: scalar on the device, images of these classified correctly.
        events: the pruner's decisions.
    """

    loss: Tensor
    correct: Tensor
    events: tuple[Event, ...]


class TrainStep:
    """Trains a session's network.

    Args:
        session: the run's state.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recipe = session.recipe
        self.forward = session.model
        if session.ranks.count > 1:
            devices = [session.device] if session.device.type == "cuda" else None
            self.forward = DistributedDataParallel(session.model, device_ids=devices)
        if self.recipe.compile:
            self.forward = torch.compile(self.forward)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.recipe.smoothing)

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutcome:
        """Trains on this rank's images of one step.

        Args:
            images: float32 ``[B, C, H, W]`` on the host.
            labels: int64 ``[B]`` on the host.

        Raises:
            FloatingPointError: an earlier step's gate gradients are not finite.
        """
        session, forwards = self.session, self.recipe.grad_accum_steps
        losses, correct = [], []
        parts = list(zip(images.chunk(forwards), labels.chunk(forwards), strict=True))
        for number, part in enumerate(parts, 1):
            with self._reducing(number == forwards):
                loss, right = self._forward_backward(*part)
            losses.append(loss)
            correct.append(right)
        optimizer, scaler = session.optimizer, session.scaler
        if self.recipe.clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(session.model.parameters(), self.recipe.clip_grad)
        scaler.step(optimizer)
        events = ()
        if session.pruner is not None:
            report = session.pruner.step(optimizer, scaler, forwards)
            events = report.events
            if report.changed and session.ranks.count > 1:
                session.pruner.rewrap(self.forward)
        scaler.update()
        optimizer.zero_grad()
        if session.ema is not None:
            session.ema.update_parameters(session.model)
        session.schedule.step()
        return StepOutcome(sum(losses) / forwards, sum(correct), events)

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Lets ranks exchange a step's gradients once, in its last backward."""
        if last or self.session.ranks.count == 1:
            return nullcontext()
        return self.forward.no_sync()

    def _forward_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a part of the step to the gradients; returns its loss and what it got right."""
        device = self.session.device
        layout = torch.channels_last if self.recipe.channels_last else torch.preserve_format
        images = images.to(device, non_blocking=True, memory_format=layout)
        labels = labels.to(device, non_blocking=True)
        with precision(self.recipe, device):
            outputs = self.forward(images)
            loss = self.criterion(outputs, labels)
        self.session.scaler.scale(loss / self.recipe.grad_accum_steps).backward()
        return loss.detach(), (outputs.argmax(1) == labels).sum()
