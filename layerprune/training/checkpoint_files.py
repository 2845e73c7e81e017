"""A checkpoint's files: written all or none, read within bounds and against their checksums."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from layerprune.training.runfolder import EMA, STRUCTURE, TRAINING, WEIGHTS, CheckpointError, settle
from layerprune.training.structure import LIMIT, decoded, encoded
from layerprune.training.untrusted import (
    parsed_json,
    read_text,
    read_torch,
    sha256,
    tensor_shapes,
    write_torch,
)

__all__ = ["read_shapes", "read_structure", "read_training", "read_weights", "save"]


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

    Raises:
        ValueError: if ``training`` holds something else, or the structure would not be read back.
    """
    folder = folder.resolve()  # a link to a checkpoint stays one
    settle(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        _write(temporary, weights, structure, training, average)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    temporary: Path,
    weights: Mapping[str, Tensor],
    structure: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    average: Mapping[str, Tensor] | None,
) -> None:
    for name, tensors in ((WEIGHTS, weights), (EMA, average)):
        if tensors is not None:
            safetensors.torch.save_file(_separate(tensors), temporary / name)
    if training is not None:
        try:
            write_torch(dict(training), temporary / TRAINING)
        except ValueError as error:
            raise ValueError(f"training cannot be saved: {error}") from error
    checksums = {path.name: sha256(path) for path in temporary.iterdir()}
    (temporary / STRUCTURE).write_text(encoded(structure, checksums), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _to_disk(path)


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, no two of them in one place: those that are shared are copied."""
    result, places = {}, set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return result


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
        text = read_text(path, LIMIT)
        found = parsed_json(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    try:
        return decoded(found)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_shapes(folder: Path, name: str = WEIGHTS) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors in a file of weights, see `untrusted.tensor_shapes`.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = _existing(folder / name)
    try:
        return tensor_shapes(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Reads a file of weights to the CPU; the tensors lie in the file, not in memory.

    Raises:
        CheckpointError: missing or damaged.
    """
    read_shapes(folder, name)
    path = folder / name
    _check_sum(path, read_structure(folder))
    try:
        return safetensors.torch.load_file(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def read_training(folder: Path) -> dict[str, Any]:
    """Reads ``training.pt`` to the CPU.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = _existing(folder / TRAINING)
    _check_sum(path, read_structure(folder))
    try:
        found = read_torch(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a mapping")
        return found
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _check_sum(path: Path, structure: Mapping[str, Any]) -> None:
    """Refuses a file of a checkpoint that is not the one that was written.

    Raises:
        CheckpointError: it is damaged.
    """
    expected = structure["checksums"].get(path.name)
    if expected is not None and sha256(path) != expected:
        raise CheckpointError(
            f"{path} is damaged or cut short: its content is not what {STRUCTURE} has the "
            "checksum of"
        )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"missing file {path}: the checkpoint is incomplete")
    return path
