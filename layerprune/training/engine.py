"""A whole run in one process, on one device: from the recipe to the report."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerprune.training import data
from layerprune.training.assembly import build_network, pick_device
from layerprune.training.interrupt import StopRequest
from layerprune.training.loop import Loop
from layerprune.training.outcome import finish
from layerprune.training.recipe import Recipe
from layerprune.training.runfolder import (
    RunFolderError,
    check_new,
    check_same,
    marked,
    recover,
    write_args,
)
from layerprune.training.runlog import RunLog
from layerprune.training.session import Session

__all__ = ["train"]


def train(
    recipe: Recipe,
    data_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    checkpoint_hist: int = 2,
) -> dict[str, Any]:
    """Trains, prunes and compacts a network, and leaves everything about it in a folder.

    Args:
        recipe: the run's settings.
        data_dir: the folder that holds the data set; not used by ``digits``.
        output: the run's folder: missing or empty, or with ``resume`` that of a run to go on with.
        resume: go on from the last checkpoint.
        device: where to train; None for the first GPU, or the CPU where there is none.
        progress: show a progress bar, or a line an epoch where there is no terminal.
        checkpoint_hist: how many of the newest checkpoints are kept.

    Returns:
        The content of ``summary.json``.

    Raises:
        RecipeError: the recipe does not go with the data.
        DataError: the data is missing or damaged.
        RunFolderError: the folder holds another run, or with ``resume`` none.
        CheckpointError: the checkpoint to go on from is damaged or of another model.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    folder = Path(output)
    if resume:
        check_same(folder, recipe)
        recover(folder)
    else:
        check_new(folder)
    where = pick_device(device)
    splits = data.load(
        recipe.dataset, data_dir, train_subset=recipe.train_subset, augment=recipe.augment
    )
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    network = build_network(recipe, splits, where)
    session = Session(recipe, network, folder, where)
    if resume:
        # A run that was stopped before its first checkpoint begins again.
        last = marked(folder, "last")
        if last is not None:
            session.restore(last)
    else:
        # Absolute: the run may be resumed from another working directory.
        place = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
        write_args(folder, recipe, place)
    with _log(session, resume) as log:
        with StopRequest() as stop:
            Loop(session, splits, log, stop, progress, checkpoint_hist).run()
        return finish(session, splits, log)


@contextmanager
def _log(session: Session, resume: bool) -> Iterator[RunLog]:
    names = [] if session.pruner is None else [info.name for info in session.pruner.sections]
    try:
        log = RunLog(session.folder, names, session.place.step if resume else None)
    except ValueError as error:
        raise RunFolderError(str(error)) from error
    with log:
        yield log
