"""One training step: from a batch to new weights, theta, average and learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerprune.judge import Event
from layerprune.training.assembly import precision
from layerprune.training.session import Session

__all__ = ["StepOutcome", "TrainStep"]


@dataclass(frozen=True)
class StepOutcome:
    """What came of a step.

    Attributes:
        loss: scalar on the device, mean over the step's images.
        correct: scalar on the device, images classified correctly.
        images: number of images.
        events: the pruner's decisions.
    """

    loss: Tensor
    correct: Tensor
    images: int
    events: tuple[Event, ...]


class TrainStep:
    """Trains a session's network.

    Args:
        session: the run's state.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.recipe = session.recipe
        self.forward = torch.compile(session.model) if self.recipe.compile else session.model
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.recipe.smoothing)

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutcome:
        """Trains on the images of one step.

        Args:
            images: float32 ``[B, C, H, W]`` on the host.
            labels: int64 ``[B]`` on the host.

        Raises:
            FloatingPointError: an earlier step's gate gradients are not finite.
        """
        session, forwards = self.session, self.recipe.grad_accum_steps
        losses, correct = [], []
        for some, theirs in zip(images.chunk(forwards), labels.chunk(forwards), strict=True):
            loss, right = self._forward_backward(some, theirs)
            losses.append(loss)
            correct.append(right)
        optimizer, scaler = session.optimizer, session.scaler
        if self.recipe.clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(session.model.parameters(), self.recipe.clip_grad)
        scaler.step(optimizer)
        events = ()
        if session.pruner is not None:
            events = session.pruner.step(optimizer, scaler, forwards).events
        scaler.update()
        optimizer.zero_grad()
        if session.ema is not None:
            session.ema.update_parameters(session.model)
        session.schedule.step()
        return StepOutcome(sum(losses) / forwards, sum(correct), len(labels), events)

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
