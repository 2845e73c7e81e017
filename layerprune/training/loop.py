"""Epochs and steps: what is trained in them, what is shown, and what is recorded."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerprune.training.data import DataSplits
from layerprune.training.evaluation import evaluate
from layerprune.training.interrupt import Interrupted, StopRequest
from layerprune.training.runfolder import mark, marked
from layerprune.training.runlog import RunLog
from layerprune.training.sampling import train_loader
from layerprune.training.session import Session
from layerprune.transfer import HostCopy

__all__ = ["Loop", "TrainingDiverged"]

_THETA_ROWS = 500
"""Rows of `theta.csv` at the most: enough for a smooth figure."""


class TrainingDiverged(FloatingPointError):
    """The loss is no longer finite; the message names the step and the last good checkpoint."""


@dataclass(frozen=True)
class _Tally:
    """A step's loss and number of images classified correctly, on their way to the host."""

    step: int
    images: int
    copy: HostCopy


class Loop:
    """The rest of a run, from where its session is.

    Args:
        session: the run's state.
        splits: the data.
        log: where rows and decisions go.
        stop: polled after every step.
        progress: show a progress bar, or a line an epoch where there is no terminal.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(
        self,
        session: Session,
        splits: DataSplits,
        log: RunLog,
        stop: StopRequest,
        progress: bool,
        keep: int,
    ) -> None:
        self.session = session
        self.recipe = session.recipe
        self.splits = splits
        self.log = log
        self.stop = stop
        self.keep = keep
        self.progress = progress
        self.tally: _Tally | None = None
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.recipe.smoothing)
        self.theta_every = -(-session.network.total_steps // _THETA_ROWS)
        self.bar = tqdm(
            total=session.network.total_steps,
            initial=session.place.step,
            unit="step",
            dynamic_ncols=True,
            # None: only where there is a terminal.
            disable=None if progress else True,
        )

    def run(self) -> None:
        """Trains to the last epoch's end.

        Raises:
            TrainingDiverged: the loss is no longer finite.
            Interrupted: a stop was requested; a checkpoint was written.
        """
        with self.bar:
            while self.session.place.epoch < self.recipe.epochs:
                self._epoch()

    def _epoch(self) -> None:
        session, place, recipe = self.session, self.session.place, self.recipe
        session.model.train()
        learning_rate = 0.0
        start = time.perf_counter()
        loader = train_loader(
            self.splits,
            recipe.batch_size,
            seed=recipe.seed,
            epoch=place.epoch,
            start_batch=place.batch,
            workers=recipe.workers,
            drop_last=True,
            pin_memory=session.device.type == "cuda",
        )
        for images, labels in loader:
            learning_rate = session.optimizer.param_groups[0]["lr"]
            events = self._step(images, labels)
            place.train_seconds += time.perf_counter() - start
            self._note_step(events)
            # At the epoch's end its evaluation and checkpoint come first.
            if self.stop.requested and place.batch < session.network.steps_per_epoch:
                self._interrupt()
            start = time.perf_counter()
        self._end_epoch(learning_rate)
        if self.stop.requested and place.epoch < recipe.epochs:
            raise Interrupted(place.step, session.folder)

    def _step(self, images: Tensor, labels: Tensor) -> tuple:
        """One training step; returns the pruner's decisions."""
        session, place = self.session, self.session.place
        layout = torch.channels_last if self.recipe.channels_last else torch.preserve_format
        images = images.to(session.device, non_blocking=True, memory_format=layout)
        labels = labels.to(session.device, non_blocking=True)
        outputs = session.model(images)
        loss = self.criterion(outputs, labels)
        loss.backward()
        self._tally()
        session.optimizer.step()
        events = ()
        if session.pruner is not None:
            try:
                events = session.pruner.step(session.optimizer).events
            except FloatingPointError as error:
                self._diverged(str(error))
        session.optimizer.zero_grad()
        session.schedule.step()
        place.step += 1
        place.batch += 1
        correct = (outputs.argmax(1) == labels).sum()
        self.tally = _Tally(place.step, len(labels), HostCopy([loss, correct]))
        return events

    def _tally(self) -> None:
        """Counts what came of the step before, which the device has had time to end."""
        place, tally = self.session.place, self.tally
        if tally is None:
            return
        self.tally = None
        loss, correct = (float(number) for number in tally.copy.get())
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss} in step {tally.step}")
        place.loss_sum += loss * tally.images
        place.correct += int(correct)

    def _diverged(self, what: str) -> None:
        last = marked(self.session.folder, "last")
        good = (
            "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        )
        raise TrainingDiverged(
            f"{what}; {good}. Try a smaller lr (now {self.recipe.lr:g}) or a longer warm-up of it"
        )

    def _note_step(self, events: tuple) -> None:
        session, place = self.session, self.session.place
        if session.pruner is not None:
            if place.step % self.theta_every == 0:
                self.log.log_theta(place.step, [info.theta for info in session.pruner.sections])
            self.log.log_events(events)
        if not self.bar.disable:
            self.bar.set_postfix(self._shown(), refresh=False)
            self.bar.update()

    def _shown(self) -> dict[str, str]:
        """Loss and accuracy of the epoch so far, and how far pruning is."""
        place = self.session.place
        seen = (place.batch - (self.tally is not None)) * self.recipe.batch_size
        shown = {}
        if seen:
            shown = {"loss": f"{place.loss_sum / seen:.3f}", "acc": f"{place.correct / seen:.3f}"}
        alive, theta, spent = self._pruning()
        if theta is not None:
            total = len(self.session.pruner.sections)
            shown |= {"sections": f"{alive}/{total}", "theta": f"{theta:.2f}"}
            shown |= {"FLOPs saved": f"{100 * (1 - spent):.0f}%"}
        return shown

    def _pruning(self) -> tuple[int | None, float | None, float]:
        """Sections alive, mean theta over all sections, and training FLOPs as share of dense."""
        pruner = self.session.pruner
        if pruner is None:
            return None, None, 1.0
        infos = pruner.sections
        alive = sum(info.status != "eliminated" for info in infos)
        return alive, sum(info.theta for info in infos) / len(infos), pruner.ledger.fraction

    def _end_epoch(self, learning_rate: float) -> None:
        session, place = self.session, self.session.place
        self._tally()
        loss, accuracy = evaluate(session.model, self.splits, session.device, self.recipe.workers)
        alive, theta, spent = self._pruning()
        shown = self._shown()
        seen = place.batch * self.recipe.batch_size
        row = {
            "epoch": place.epoch + 1,
            "step": place.step,
            "lr": learning_rate,
            "train_loss": place.loss_sum / seen,
            "train_accuracy": place.correct / seen,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "sections_alive": alive,
            "mean_theta": theta,
            "train_flops_fraction": spent,
            "seconds": session.seconds(),
        }
        self.log.log_epoch(row)
        place.epoch += 1
        place.batch, place.loss_sum, place.correct = 0, 0.0, 0
        # While sections still come and go, the best network is not one that the run ends with.
        settled = session.pruner is None or session.pruner.phase == "cool-down"
        best = settled and (place.best_accuracy is None or accuracy > place.best_accuracy)
        if best:
            place.best_accuracy = accuracy
        self._save()
        if best:
            mark(session.folder, "best", f"checkpoint-{place.step}")
        if self.progress and self.bar.disable:
            words = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(
                f"epoch {place.epoch}/{self.recipe.epochs}  {words}  test {accuracy:.4f}",
                flush=True,
            )

    def _save(self) -> None:
        try:
            self.session.save(self.keep)
        except FloatingPointError as error:  # nobody has looked at the last step's gradients yet
            self._diverged(str(error))

    def _interrupt(self) -> None:
        self._tally()
        self.log.flush()
        self._save()
        raise Interrupted(self.session.place.step, self.session.folder)
