"""A whole run, from the recipe to the report, on one device or on one for each rank."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from layerprune.ranks import Ranks
from layerprune.training import data
from layerprune.training.assembly import Network, build_network, pick_device
from layerprune.training.data import DataSplits
from layerprune.training.group import check_divides, joined
from layerprune.training.interrupt import StopRequest
from layerprune.training.loop import Loop, theta_every
from layerprune.training.outcome import finish
from layerprune.training.recipe import Recipe
from layerprune.training.records import EPOCHS_FILE, EVENTS_FILE, THETA_FILE, read_run
from layerprune.training.runfolder import (
    RunFolderError,
    check_new,
    check_same,
    newest,
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

    Where torchrun started several processes, all of them call it, and rank 0 writes.

    Args:
        recipe: the run's settings.
        data_dir: the folder that holds the data set; not used by ``digits``.
        output: the run's folder: missing or empty, or with ``resume`` that of a run to go on with.
        resume: go on from the last checkpoint.
        device: where to train; None for a GPU, each rank its own, or the CPU where there is none.
        progress: show a progress bar, or a line an epoch where there is no terminal.
        checkpoint_hist: how many of the newest checkpoints are kept.

    Returns:
        The content of ``summary.json``; on other ranks than 0 nothing.

    Raises:
        RecipeError: the recipe does not go with the data or the number of ranks.
        DataError: the data is missing or damaged.
        RunFolderError: the folder holds another run, or with ``resume`` none.
        CheckpointError: the checkpoint to go on from is damaged, of another model or of another
            number of ranks.
        TrainingDiverged: the loss is no longer finite.
        Interrupted: Ctrl-C or SIGTERM, on any rank; a checkpoint was written.
        FirstRankFailed: rank 0 raises one of these errors.
    """
    folder, where = Path(output), pick_device(device)
    with ExitStack() as opened:
        with joined(where):
            ranks = Ranks()
            check_divides(recipe, ranks)
            ranks.first_alone(lambda: _prepare(folder, recipe, resume))
            splits = data.load(
                recipe.dataset, data_dir, train_subset=recipe.train_subset, augment=recipe.augment
            )
            session = Session(recipe, _network(recipe, splits, where, ranks), folder, where, ranks)
            if resume:
                # A run that was stopped before its first checkpoint begins again.
                last = newest(folder)
                if last is not None:
                    session.restore(last)
            # Absolute: the run may be resumed from another working directory.
            place = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
            ranks.first_alone(lambda: None if resume else write_args(folder, recipe, place))
            if session.place.step:
                ranks.first_alone(lambda: _check_tables(session))
            log = opened.enter_context(_log(session, resume))
            with StopRequest() as stop:
                Loop(session, splits, log, stop, progress, checkpoint_hist).run()
            ledger = session.ledger()
        return {} if log is None else finish(session, splits, log, ledger)


def _prepare(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Refuses a folder that does not go with the run, and puts in order what a kill has left."""
    if resume:
        check_same(folder, recipe)
        recover(folder)
    else:
        check_new(folder)


def _network(recipe: Recipe, splits: DataSplits, device: torch.device, ranks: Ranks) -> Network:
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    network = build_network(recipe, splits, device, ranks.count)
    if ranks.rank > 0:
        # The weights are the same on all ranks; dropout masks are not to be.
        torch.manual_seed(recipe.seed + ranks.rank)
    return network


def _check_tables(session: Session) -> None:
    """Refuses to go on where rows are lost that the summary and the report are made of."""
    place, pruner = session.place, session.pruner
    try:
        record = read_run(session.folder)
    except (FileNotFoundError, ValueError) as error:
        raise RunFolderError(str(error)) from error
    thetas = place.step // theta_every(session.network.total_steps)
    tables = {
        EPOCHS_FILE: ([row["step"] for row in record.epochs], place.epoch),
        EVENTS_FILE: ([e["step"] for e in record.events], len(pruner.events) if pruner else 0),
        THETA_FILE: (record.theta_steps, thetas if pruner else 0),
    }
    for name, (steps, written) in tables.items():
        found = sum(step <= place.step for step in steps)
        if found != written:
            raise RunFolderError(
                f"{session.folder / name} has {found} rows up to step {place.step}, of {written} "
                "that the run has written: put the file back, or begin anew in another --output"
            )


@contextmanager
def _log(session: Session, resume: bool) -> Iterator[RunLog | None]:
    if session.ranks.rank > 0:
        yield None
        return
    names = [] if session.pruner is None else [info.name for info in session.pruner.sections]
    try:
        log = RunLog(session.folder, names, session.place.step if resume else None)
    except ValueError as error:
        raise RunFolderError(str(error)) from error
    with log:
        yield log
