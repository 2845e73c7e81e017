"""A run's state between two steps: all of it goes into a checkpoint and comes back from one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.training import checkpoint
from layerprune.training.assembly import Network, make_optimizer, make_schedule
from layerprune.training.recipe import Recipe
from layerprune.training.runfolder import CheckpointError, drop_old, mark

__all__ = ["Place", "Session"]


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
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best_accuracy: float | None = None


class Session:
    """Network, optimizer, schedule and place of a run.

    Args:
        recipe: the run's settings.
        network: the dense network, freshly built.
        folder: the run's folder.
        device: where the network is.
    """

    def __init__(
        self, recipe: Recipe, network: Network, folder: Path, device: torch.device
    ) -> None:
        self.recipe = recipe
        self.network = network
        self.model = network.model
        self.pruner = network.pruner
        self.folder = folder
        self.device = device
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

        Args:
            keep: how many of the newest stay.
        """
        rng = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "rng": rng,
            "place": asdict(self.place) | {"seconds": self.seconds()},
        }
        name = f"checkpoint-{self.place.step}"
        checkpoint.save(self.folder / name, self.model.state_dict(), self.structure(), training)
        mark(self.folder, "last", name)
        drop_old(self.folder, keep)

    def restore(self, folder: Path) -> None:
        """Goes on from a checkpoint; nothing may have been trained yet.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        builder = checkpoint.read_structure(folder)["builder"]
        if builder != self.network.builder:
            raise CheckpointError(
                f"{folder} is of another model: {builder}, where the recipe has "
                f"{self.network.builder}"
            )
        training = checkpoint.read_training(folder)
        try:
            if self.pruner is not None:
                # First the structure: it decides which weights and which parameters there are.
                self.pruner.load_state_dict(training["pruner"])
            checkpoint.load_weights(self.model, folder)
            self._attach_optimizer()
            self.optimizer.load_state_dict(training["optimizer"])
            self.schedule.load_state_dict(training["schedule"])
            self.place = Place(**training["place"])
            torch.set_rng_state(training["rng"]["torch"])
            if self.device.type == "cuda" and "cuda" in training["rng"]:
                torch.cuda.set_rng_state(training["rng"]["cuda"], self.device)
        except CheckpointError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / checkpoint.TRAINING} is damaged or of another run: {error}"
            ) from error
