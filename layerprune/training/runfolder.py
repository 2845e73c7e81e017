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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from layerprune.brief import brief
from layerprune.training.records import EPOCHS_FILE, write_atomic
from layerprune.training.untrusted import YAML_LIMIT, parsed_yaml, read_text

if TYPE_CHECKING:
    from layerprune.training.recipe import Recipe

__all__ = ["CheckpointError", "RunFolderError"]

ARGS = "args.yaml"
WEIGHTS, STRUCTURE, TRAINING = "model.safetensors", "structure.json", "training.pt"
EMA = "ema.safetensors"
FINAL, FINAL_EMA = "model", "model-ema"
"""Folders of the compacted network, and of its weights' average."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+|model|model-ema|last|best|\w+\.(?:yaml|csv|json|jsonl|html))\.(?:tmp|old)"
)
_FREE = ("workers", "checkpoint_steps")
"""Settings that change no result, so that a resumed run may have others."""


class _Dumper(yaml.SafeDumper):
    """Writes a value out wherever it occurs: what is written with aliases is not read back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
    # A run that was killed before it had settings has left at most a part of them.
    taken = (
        folder.exists()
        and not folder.is_dir()
        or any(not _LEFTOVER.fullmatch(path.name) for path in folder.glob("*"))
    )
    if taken:
        raise RunFolderError(f"{folder} is not an empty folder: choose another --output")


def check_same(folder: Path, recipe: Recipe) -> None:
    """Refuses to resume a run with other settings than it began with.

    Raises:
        RunFolderError: there is no run, or settings differ.
    """
    before, _ = read_args(folder)
    check_settings(folder, before.as_dict(), recipe)


def deciding(recipe: Recipe) -> dict[str, Any]:
    """The settings that a run's results depend on."""
    return {key: value for key, value in recipe.as_dict().items() if key not in _FREE}


def check_settings(folder: Path, before: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuses settings that are not those of a run.

    Args:
        folder: where the run's settings were found.
        before: the run's.
        recipe: those to go on with.

    Raises:
        RunFolderError: they differ.
    """
    changed = [
        f"{key} ({brief(before.get(key))}, now {value!r})"
        for key, value in deciding(recipe).items()
        if before.get(key) != value
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
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_atomic(folder / ARGS, text)


def read_args(folder: Path) -> tuple[Recipe, str | None]:
    """The recipe of a run and where its data was.

    Raises:
        RunFolderError: there is no run, or ``args.yaml`` is damaged.
    """
    # Recipes need the data sets' libraries, which the rest of this module does without.
    from layerprune.training.recipe import RecipeError, from_mapping

    path = folder / ARGS
    if not path.is_file():
        raise RunFolderError(f"{folder} holds no run: it has no {ARGS}")
    try:
        values: dict[str, Any] = dict(parsed_yaml(read_text(path, YAML_LIMIT)))
        data_dir = values.pop("data_dir", None)
        if not (data_dir is None or isinstance(data_dir, str)):
            raise TypeError(f"data_dir must be a folder's name, got {data_dir!r}")
        return from_mapping(values, str(path)), data_dir
    except (TypeError, ValueError) as error:
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
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: put a file there that names a checkpoint")
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        name = file.read(100).strip()
    if not _CHECKPOINT.fullmatch(name):
        raise CheckpointError(f"{path} does not hold a checkpoint's name: write one of {run} there")
    if not (run / name).is_dir():
        raise CheckpointError(f"{path} points at {name}, which is not there: name another one")
    return run / name


def newest(run: Path) -> Path | None:
    """The checkpoint of a run to go on from: the one marked as the last, else the newest.

    A run that was killed before it marked its first one has no marker.

    Raises:
        CheckpointError: as `marked`.
    """
    last = marked(run, "last")
    if last is not None:
        return last
    numbered = {
        int(match[1]): path
        for path in run.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return numbered[max(numbered)] if numbered else None


def drop_old(run: Path, keep: int) -> None:
    """Deletes a run's checkpoints but the ``keep`` newest and those that are marked.

    One that is being deleted has no checkpoint's name any more, so that none is ever found in part.
    """
    numbered = ((_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir())
    ordered = sorted((int(match[1]), path) for match, path in numbered if match)
    held = {marked(run, "last"), marked(run, "best")}
    for _, path in ordered[:-keep]:
        if path not in held:
            leftover = path.with_name(f".{path.name}.tmp")
            shutil.rmtree(leftover, ignore_errors=True)
            os.replace(path, leftover)
            shutil.rmtree(leftover)


def settle(folder: Path) -> None:
    """Ends the replacement of a checkpoint that was cut short: the old one is back, or is gone."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for leftover in (old, folder.with_name(f".{folder.name}.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)


def recover(run: Path) -> None:
    """Puts a run's folder in order after its process was killed while it wrote: see `settle`."""
    for path in sorted(run.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match and path.is_dir():
            settle(run / match[1])
        elif match and path.suffix == ".tmp":
            path.unlink(missing_ok=True)


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a path.

    Args:
        path: a checkpoint's folder, a marker, or a run's folder (its final model, else its last
            checkpoint).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old") if path.name else path
    if old.is_dir() and not path.exists():
        return old  # whoever replaced it was killed in between
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
