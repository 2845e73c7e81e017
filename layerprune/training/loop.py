"""Epochs and steps: what is trained in them, what is recorded, and when a checkpoint is due."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from layerprune.judge import Event
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import evaluate
from layerprune.training.interrupt import Interrupted, StopRequest
from layerprune.training.progress import Progress, pruning
from layerprune.training.runfolder import marked
from layerprune.training.runlog import RunLog
from layerprune.training.sampling import train_loader
from layerprune.training.session import Session
from layerprune.training.step import TrainStep
from layerprune.transfer import HostCopy

__all__ = ["Loop", "TrainingDiverged"]

_THETA_ROWS = 500
"""Rows of `theta.csv` at the most: enough for a smooth figure."""


def theta_every(total_steps: int) -> int:
    """Steps from one row of `theta.csv` to the next."""
    return -(-total_steps // _THETA_ROWS)


class TrainingDiverged(FloatingPointError):
    """The loss is no longer finite; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class _Tally:
    """A step's loss and number of images classified correctly, on their way to the host."""

    step: int
    copy: HostCopy


class Loop:
    """The rest of a run, from where its session is.

    Args:
        session: the run's state.
        splits: the data.
        log: where rows and decisions go; None on all ranks but one.
        stop: asked after every step.
        progress: show a progress bar, or a line an epoch where there is no terminal.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(
        self,
        session: Session,
        splits: DataSplits,
        log: RunLog | None,
        stop: StopRequest,
        progress: bool,
        keep: int,
    ) -> None:
        self.session = session
        self.recipe = session.recipe
        self.ranks = session.ranks
        self.splits = splits
        self.log = log
        self.stop = stop
        self.stopping = 0
        self.keep = keep
        self.tally: _Tally | None = None
        self.train_step = TrainStep(session)
        self.theta_every = theta_every(session.network.total_steps)
        self.progress = Progress(session, progress and log is not None)

    def run(self) -> None:
        """Trains to the last epoch's end.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            Interrupted: a stop was requested; a checkpoint was written.
        """
        with self.progress:
            while self.session.place.epoch < self.recipe.epochs:
                self._epoch()

    def _epoch(self) -> None:
        session, place, recipe = self.session, self.session.place, self.recipe
        session.model.train()
        learning_rate = 0.0
        start = time.perf_counter()
        loader = train_loader(
            self.splits,
            recipe.step_rows,
            seed=recipe.seed,
            epoch=place.epoch,
            start_batch=place.batch,
            workers=recipe.workers,
            drop_last=True,
            pin_memory=session.device.type == "cuda",
            part=(self.ranks.rank, self.ranks.count),
        )
        for images, labels in loader:
            learning_rate = session.optimizer.param_groups[0]["lr"]
            events = self._step(images, labels)
            place.train_seconds += time.perf_counter() - start
            self._note_step(events)
            # At the epoch's end its evaluation comes first.
            if place.batch < session.network.steps_per_epoch:
                self._save_between()
            start = time.perf_counter()
        self._end_epoch(learning_rate)
        if self.stopping and place.epoch < recipe.epochs:
            raise Interrupted(place.step, session.folder, self.stopping)

    def _save_between(self) -> None:
        """Saves within an epoch if it is time to, or if a signal asks to stop."""
        every, place = self.recipe.checkpoint_steps, self.session.place
        stopping = self.stopping
        if stopping or (every is not None and place.step % every == 0):
            self._save()
        if stopping:
            raise Interrupted(place.step, self.session.folder, stopping)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Event, ...]:
        """One training step; returns the pruner's decisions."""
        place = self.session.place
        try:
            outcome = self.train_step(images, labels)
        except FloatingPointError as error:
            self._diverged(str(error))
        # Of the step before, which the device has had time to end.
        self._tally()
        place.step += 1
        place.batch += 1
        self.tally = _Tally(place.step, HostCopy([outcome.loss, outcome.correct]))
        return outcome.events

    def _tally(self) -> None:
        """Counts what came of the last step on all ranks, and hears whether one is to stop."""
        tally, self.tally = self.tally, None
        mine = [0.0, 0.0] if tally is None else [float(number) for number in tally.copy.get()]
        told = self.ranks.gather(torch.tensor([self.stop.signal, *mine], dtype=torch.float64))
        signals, losses, correct = told.unbind(1)
        self.stopping = int(signals.max())
        if tally is None:
            return
        loss, place = float(losses.mean()), self.session.place
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss} in step {tally.step}")
        place.loss_sum += loss * self.recipe.step_rows
        place.correct += int(correct.sum())

    def _diverged(self, what: str) -> NoReturn:
        last = marked(self.session.folder, "last")
        good = (
            "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        )
        raise TrainingDiverged(
            f"{what}; {good}. Try a smaller lr (now {self.recipe.lr:g}) or a longer warm-up of it"
        )

    def _note_step(self, events: tuple[Event, ...]) -> None:
        session, place = self.session, self.session.place
        if session.pruner is not None and self.log is not None:
            if place.step % self.theta_every == 0:
                self.log.log_theta(place.step, [info.theta for info in session.pruner.sections])
            self.log.log_events(events)
        self.progress.step((place.batch - (self.tally is not None)) * self.recipe.step_rows)

    def _end_epoch(self, learning_rate: float) -> None:
        session, place = self.session, self.session.place
        self._tally()
        loss, accuracy = self._evaluate(session.model)
        average = None if session.ema is None else session.ema.module
        ema_loss, ema_accuracy = self._evaluate(average)
        alive, theta = pruning(session)
        spent = session.ledger().fraction
        seen = place.batch * self.recipe.step_rows
        if self.log is not None:
            self.log.log_epoch(
                {
                    "epoch": place.epoch + 1,
                    "step": place.step,
                    "lr": learning_rate,
                    "train_loss": place.loss_sum / seen,
                    "train_accuracy": place.correct / seen,
                    "test_loss": loss,
                    "test_accuracy": accuracy,
                    "ema_loss": ema_loss,
                    "ema_accuracy": ema_accuracy,
                    "sections_alive": alive,
                    "mean_theta": theta,
                    "train_flops_fraction": spent,
                    "seconds": session.seconds(),
                }
            )
        self.progress.epoch(seen, accuracy)
        place.epoch += 1
        place.batch, place.loss_sum, place.correct = 0, 0.0, 0
        # While sections still come and go, the best network is not one that the run ends with.
        settled = session.pruner is None or session.pruner.phase == "cool-down"
        if settled and (place.best_accuracy is None or accuracy > place.best_accuracy):
            place.best_accuracy, place.best_step = accuracy, place.step
        self._save()

    def _evaluate(self, model: nn.Module | None) -> tuple[float | None, float | None]:
        """Loss and accuracy; None of no model."""
        if model is None:
            return None, None
        workers = self.recipe.workers
        return evaluate(model, self.splits, self.session.device, workers, self.ranks)

    def _save(self) -> None:
        self._tally()
        if self.log is not None:
            self.log.flush()
        try:
            self.session.save(self.keep)
        except FloatingPointError as error:  # nobody has looked at the last step's gradients yet
            self._diverged(str(error))
