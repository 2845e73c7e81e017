"""Checkpoints: a folder with the weights, the network's structure, and what a resumed run needs.

==================  ==============================================================================
model.safetensors   the weights
structure.json      how the dense network is built, which sections are gone, theta of the others
ema.safetensors     the weights' average, where one is kept
training.pt         optimizer, schedule, pruner, random state, place in the run; not in the final
                    model's folder
==================  ==============================================================================

Nothing in them is run when they are read: safetensors, JSON, and a `torch.load` that takes only
tensors and plain containers. A folder appears under its name when all of it is on disk, or not at
all.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from layerprune import models
from layerprune._version import __version__
from layerprune.compaction import eliminate_sections
from layerprune.training.runfolder import (
    EMA,
    STRUCTURE,
    TRAINING,
    WEIGHTS,
    CheckpointError,
    locate,
)

__all__ = ["CheckpointError", "load_model"]

SCHEMA = 1
"""Version of the files' content."""

_GREATEST = 65536
"""Bound of a builder's numbers: a damaged file is not to ask for all memory there is."""

# What torch.load raises on a file that is cut short, of another format, or holds code.
_UNREADABLE = (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError)


def structure_of(
    builder: Mapping[str, Any], dataset: str, eliminated: list[str], sections: list[dict]
) -> dict[str, Any]:
    """The content of ``structure.json``.

    Args:
        builder: ``name`` and ``kwargs`` of `layerprune.models.build`.
        dataset: what the network was trained on.
        eliminated: names of the sections that are gone.
        sections: name, kind, theta and status of every section the model started with; empty for
            a network that was not pruned.
    """
    return {
        "schema": SCHEMA,
        "layerprune": __version__,
        "builder": dict(builder),
        "dataset": dataset,
        "eliminated": list(eliminated),
        "sections": sections,
    }


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    structure: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint; an older one under the same name stays until the new one is complete.

    Args:
        folder: where to.
        weights: the model's `state_dict`.
        structure: from `structure_of`.
        training: tensors, numbers, text and containers of them.
        average: the averaged model's `state_dict`, if there is one.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in ((WEIGHTS, weights), (EMA, average)):
        if tensors is not None:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(plain, temporary / name)
    (temporary / STRUCTURE).write_text(json.dumps(structure, indent=2) + "\n", encoding="utf-8")
    if training is not None:
        torch.save(dict(training), temporary / TRAINING)
    for path in (*temporary.iterdir(), temporary):
        _to_disk(path)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_structure(folder: Path) -> dict[str, Any]:
    """Reads and checks ``structure.json``.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = _existing(folder / STRUCTURE)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema version {schema!r}, this version of layerprune reads {SCHEMA}"
        )
    try:
        builder = found["builder"]
        well_formed = (
            isinstance(builder["name"], str)
            and all(isinstance(value, str | int) for value in builder["kwargs"].values())
            and isinstance(found["dataset"], str)
            and all(isinstance(name, str) for name in found["eliminated"])
            and all(
                isinstance(part["name"], str)
                and isinstance(part["status"], str)
                and 0.0 <= part["theta"] <= 1.0
                for part in found["sections"]
            )
        )
    except (AttributeError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path} is damaged: it lacks the network's builder or its sections")
    return found


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Reads ``model.safetensors``, or the average's file, to the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = _existing(folder / name)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def read_training(folder: Path) -> dict[str, Any]:
    """Reads ``training.pt`` to the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = _existing(folder / TRAINING)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or cut short: {what}") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"missing file {path}: the checkpoint is incomplete")
    return path


def absent(structure: Mapping[str, Any]) -> list[str]:
    """Names of the sections that evaluation does not run: eliminated, or theta below 1/2."""
    closed = [
        part["name"]
        for part in structure["sections"]
        if part["status"] == "open" and part["theta"] < 0.5
    ]
    return [*structure["eliminated"], *(n for n in closed if n not in structure["eliminated"])]


def example_inputs(kwargs: Mapping[str, Any]) -> Tensor:
    """Two empty images of the size that a network was built for."""
    return torch.zeros(2, kwargs["in_channels"], kwargs["image_size"], kwargs["image_size"])


def build_dense(folder: Path, structure: Mapping[str, Any]) -> nn.Module:
    """The dense network of a checkpoint, with fresh weights.

    Raises:
        CheckpointError: no such network.
    """
    builder = structure["builder"]
    if any(
        abs(value) > _GREATEST for value in builder["kwargs"].values() if isinstance(value, int)
    ):
        raise CheckpointError(f"{folder / STRUCTURE} asks for a network beyond all bounds")
    try:
        return models.build(builder["name"], **builder["kwargs"])
    except (TypeError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"{folder / STRUCTURE}: {what}") from error


def load_weights(model: nn.Module, folder: Path, name: str = WEIGHTS) -> None:
    """Loads a checkpoint's weights into a model of its structure.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    try:
        model.load_state_dict(read_weights(folder, name))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder / name} does not fit the network of {STRUCTURE}: {detail}"
        ) from error


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the network of a checkpoint, without the script that trained it.

    Args:
        path: a checkpoint's folder, a ``last`` or ``best`` marker, or a run's folder.

    Returns:
        The network, plain and in evaluation mode, without the sections that evaluation would not
        run; and the content of ``structure.json``.

    Raises:
        CheckpointError: it is missing, damaged, or its files do not fit each other.
    """
    folder = locate(path)
    structure = read_structure(folder)
    model = build_dense(folder, structure)
    example = example_inputs(structure["builder"]["kwargs"])
    gone = structure["eliminated"]
    try:
        eliminate_sections(model, gone, example)
        load_weights(model, folder)
        eliminate_sections(model, [n for n in absent(structure) if n not in gone], example)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / STRUCTURE}: {error}") from error
    return model.eval(), structure
