"""A run's folder: its settings, which checkpoints it holds, and who may write to it.

====================  ============================================================================
args.yaml             the recipe, and where the data is
checkpoint-N/         the run after N steps; the newest few and the best one are kept
last, best            files that hold the name of one of the checkpoints
model/                the compacted network of a finished run
model-ema/            the same with its weights' average, where one was kept
====================  ============================================================================

`layerprune.training.records` has the tables beside these.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from layerprune.training.recipe import Recipe, RecipeError, from_mapping
from layerprune.training.records import EPOCHS_FILE, write_atomic

__all__ = ["CheckpointError", "RunFolderError"]

ARGS = "args.yaml"
WEIGHTS, STRUCTURE, TRAINING = "model.safetensors", "structure.json", "training.pt"
EMA = "ema.safetensors"
FINAL, FINAL_EMA = "model", "model-ema"
"""Folders of the compacted network, and of its weights' average."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FREE = ("workers", "checkpoint_steps")
"""Settings that change no result, so that a resumed run may have others."""


class RunFolderError(ValueError):
    """The folder holds another run, or none; the message says what to do."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model; the message names the file."""


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (folder / ARGS).is_file()


def check_new(folder: Path) -> None:
    """Refuses a folder that a new run cannot have.

    Raises:
        RunFolderError: it is not empty, or it is a file.
    """
    if holds_run(folder) or (folder / EPOCHS_FILE).exists():
        raise RunFolderError(
            f"{folder} already holds a run: go on with it (--resume), or choose another --output"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is not an empty folder: choose another --output")


def check_same(folder: Path, recipe: Recipe) -> None:
    """Refuses to resume a run with other settings than it began with.

    Raises:
        RunFolderError: there is no run, or settings differ.
    """
    before, _ = read_args(folder)
    old, new = before.as_dict(), recipe.as_dict()
    changed = [
        f"{key} ({old[key]!r}, now {new[key]!r})"
        for key in new
        if key not in _FREE and old[key] != new[key]
    ]
    if changed:
        raise RunFolderError(
            f"{folder} holds a run with other settings: {', '.join(changed)}. Resume it with its "
            "own, or choose another --output"
        )


def write_args(folder: Path, recipe: Recipe, data_dir: str | None) -> None:
    """Writes ``args.yaml``, and makes the folder if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    values = recipe.as_dict() | {"data_dir": data_dir}
    write_atomic(folder / ARGS, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def read_args(folder: Path) -> tuple[Recipe, str | None]:
    """The recipe of a run and where its data was.

    Raises:
        RunFolderError: there is no run, or ``args.yaml`` is damaged.
    """
    path = folder / ARGS
    if not path.is_file():
        raise RunFolderError(f"{folder} holds no run: it has no {ARGS}")
    try:
        values: dict[str, Any] = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        data_dir = values.pop("data_dir", None)
        return from_mapping(values, str(path)), data_dir
    except (yaml.YAMLError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise RunFolderError(str(error)) from error
        raise RunFolderError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def mark(run: Path, marker: str, checkpoint: str) -> None:
    """Points ``last`` or ``best`` of a run at one of its checkpoints.

    The marker is a file that holds the name: unlike a link it survives copies and archives.
    """
    write_atomic(run / marker, checkpoint + "\n")


def marked(run: Path, marker: str) -> Path | None:
    """The checkpoint that a marker points at; None without the marker.

    Raises:
        CheckpointError: the marker holds no checkpoint's name, or that checkpoint is gone.
    """
    path = run / marker
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _CHECKPOINT.fullmatch(name):
        raise CheckpointError(f"{path} does not hold a checkpoint's name: write one of {run} there")
    if not (run / name).is_dir():
        raise CheckpointError(f"{path} points at {name}, which is not there: name another one")
    return run / name


def drop_old(run: Path, keep: int) -> None:
    """Deletes a run's checkpoints but the ``keep`` newest and those that are marked."""
    numbered = ((_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir())
    ordered = sorted((int(match[1]), path) for match, path in numbered if match)
    held = {marked(run, "last"), marked(run, "best")}
    for _, path in ordered[:-keep]:
        if path not in held:
            shutil.rmtree(path)


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a path.

    Args:
        path: a checkpoint's folder, a marker, or a run's folder (its final model, else its last
            checkpoint).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_file() and path.name in ("last", "best"):
        path, marker = path.parent, path.name
    else:
        marker = "last"
        for folder in (path, path / FINAL):
            if (folder / STRUCTURE).is_file() or (folder / WEIGHTS).is_file():
                return folder
    found = marked(path, marker)
    if found is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run's folder with one")
    return found
