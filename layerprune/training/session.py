"""A run's state between two steps: all of it goes into a checkpoint and comes back from one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerprune.brief import brief
from layerprune.ledger import Ledger
from layerprune.ranks import Ranks
from layerprune.training import checkpoint
from layerprune.training.assembly import Network, make_optimizer, make_scaler, make_schedule
from layerprune.training.recipe import Recipe
from layerprune.training.runfolder import (
    EMA,
    CheckpointError,
    RunFolderError,
    check_settings,
    deciding,
    drop_old,
    mark,
)
from layerprune.training.typed import coerced
from layerprune.training.untrusted import what_failed

__all__ = ["Place", "Session"]

# What torch and this package raise when a state's values are not what they were.
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Place:
    """Where a run is.

    Attributes:
        step: steps done.
        epoch: epochs done.
        batch: batches of the present epoch done.
        loss_sum: of the present epoch's images.
        correct: images of the present epoch that were classified correctly.
        train_seconds: wall time of the training steps, fetching the images included.
        seconds: wall time of the whole run.
        best_accuracy: of the checkpoint marked ``best``.
        best_step: its step.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best_accuracy: float | None = None
    best_step: int | None = None


class Session:
    """Network, average, optimizer, scaler, schedule and place of a run.

    Args:
        recipe: the run's settings.
        network: the dense network, freshly built.
        folder: the run's folder.
        device: where the network is.
        ranks: the processes that train it, each with a session of its own; rank 0 writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: Network,
        folder: Path,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.recipe = recipe
        self.network = network
        self.model = network.model
        self.pruner = network.pruner
        self.ema = network.ema
        self.scaler = make_scaler(recipe, device)
        self.folder = folder
        self.device = device
        self.ranks = ranks
        self.place = Place()
        self._started = time.perf_counter()
        self._attach_optimizer()

    def _attach_optimizer(self) -> None:
        self.optimizer = make_optimizer(self.recipe, self.model)
        steps = self.network.steps_per_epoch
        self.schedule = make_schedule(self.recipe, self.optimizer, steps)

    def seconds(self) -> float:
        """Wall time of the run so far, before an interruption and after it."""
        return self.place.seconds + time.perf_counter() - self._started

    def structure(self) -> dict[str, Any]:
        """The content of a checkpoint's ``structure.json``."""
        found = {"eliminated": list(self.recipe.without), "sections": []}
        if self.pruner is not None:
            found = self.pruner.structure()
        builder = self.network.builder
        example = checkpoint.example_inputs(builder["kwargs"])
        return checkpoint.structure_of(builder, self.recipe.dataset, example, **found)

    def save(self, keep: int) -> None:
        """Writes ``checkpoint-N``, marks it as the last, and deletes old ones.

        All ranks call it together, and rank 0 writes. If its step is the best one, it is marked as
        that as well.

        Args:
            keep: how many of the newest stay.
        """
        ledgers = self._ledgers()
        training = {
            "recipe": deciding(self.recipe),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "ledgers": [asdict(ledger) for ledger in ledgers],
            "rng": self._random_states(),
            "place": asdict(self.place) | {"seconds": self.seconds()},
        }
        if self.ranks.rank > 0:
            return
        name = f"checkpoint-{self.place.step}"
        checkpoint.save(
            self.folder / name,
            self.model.state_dict(),
            self.structure(),
            training,
            None if self.ema is None else self.ema.module.state_dict(),
        )
        mark(self.folder, "last", name)
        self._mark_best()
        drop_old(self.folder, keep)

    def ledger(self) -> Ledger:
        """What all ranks have spent together; times are rank 0's. They call it together."""
        first, *others = self._ledgers()
        flops = ("train_flops", "dense_train_flops", "test_flops")
        sums = {name: sum(getattr(x, name) for x in (first, *others)) for name in flops}
        return replace(first, **sums)

    def _ledgers(self) -> list[Ledger]:
        """What each rank has spent; they call it together."""
        mine = Ledger() if self.pruner is None else self.pruner.ledger
        told = self.ranks.gather(torch.tensor(list(asdict(mine).values()), dtype=torch.float64))
        return [Ledger(*numbers) for numbers in told.tolist()]

    def _random_states(self) -> dict[str, Tensor]:
        """The state of each rank's generators, by kind; they call it together."""
        states = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {kind: self.ranks.gather(state) for kind, state in states.items()}

    def _mark_best(self) -> None:
        """Lets the marker say what the last checkpoint says, whenever a run was killed."""
        step = self.place.best_step
        if step is None or not (self.folder / f"checkpoint-{step}").is_dir():
            (self.folder / "best").unlink(missing_ok=True)
        else:
            mark(self.folder, "best", f"checkpoint-{step}")

    def restore(self, folder: Path) -> None:
        """Goes on from a checkpoint; nothing may have been trained yet.

        Raises:
            CheckpointError: it is damaged, or of another model.
            RunFolderError: it is of a run with other settings.
        """
        structure = checkpoint.read_structure(folder)
        if structure["builder"] != self.network.builder:
            raise CheckpointError(
                f"{folder} is of another model: {brief(structure['builder'])}, where the recipe "
                f"has {self.network.builder}"
            )
        training = checkpoint.read_training(folder)
        if "recipe" not in training:
            version = structure.get("layerprune")
            raise CheckpointError(
                f"{folder / checkpoint.TRAINING} was not written by layerprune train, or by one "
                f"too old to go on from (version {brief(version)}): begin anew, or finish the run "
                "with that version"
            )
        try:
            check_settings(folder, training["recipe"], self.recipe)
            saved, here = len(training["ledgers"]), self.ranks.count
            if saved != here:
                raise CheckpointError(
                    f"{folder} is of a run of {saved} ranks and cannot go on with {here}: start "
                    "as many as it began with (torchrun --nproc-per-node)"
                )
            if self.pruner is not None:
                # First the structure: it decides which weights and which parameters there are.
                ledger = training["ledgers"][self.ranks.rank]
                self.pruner.load_state_dict(training["pruner"] | {"ledger": ledger})
            self.place = self._checked(training["place"])
            checkpoint.load_weights(self.model, folder)
            if self.ema is not None:
                checkpoint.load_weights(self.ema.module, folder, name=EMA)
                self.ema.n_averaged.fill_(self.place.step)
            self._attach_optimizer()
            self.optimizer.load_state_dict(training["optimizer"])
            self.scaler.load_state_dict(training["scaler"])
            self.schedule.load_state_dict(training["schedule"])
            # Copies: torch takes no part of a tensor for a generator's state.
            mine = {
                kind: states[self.ranks.rank].clone() for kind, states in training["rng"].items()
            }
            torch.set_rng_state(mine["torch"])
            if self.device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"], self.device)
        except (CheckpointError, RunFolderError):
            raise
        except _DAMAGED as error:
            raise CheckpointError(
                f"{folder / checkpoint.TRAINING} is damaged or of another run: {what_failed(error)}"
            ) from error
        if self.ranks.rank == 0:
            self._mark_best()

    def _checked(self, saved: Any) -> Place:
        """A saved place, if a run like this one can be there.

        Raises:
            ValueError: it cannot.
        """
        place, network = Place(**coerced(Place, saved, "its place")), self.network
        done = place.epoch * network.steps_per_epoch + place.batch
        within = 0 <= place.batch < network.steps_per_epoch and 0 <= place.epoch
        counted = self.pruner is None or self.pruner.step_count == done
        if not (within and counted and done == place.step <= network.total_steps):
            raise ValueError(f"no run is at {brief(saved)}")
        return place
