"""Checks any checkpoint: on the data it was trained on, or without it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerprune.calls import Inputs
from layerprune.training import data
from layerprune.training.builders import Builder
from layerprune.training.checkpoint import read_structure
from layerprune.training.evaluation import compaction_difference, test_images
from layerprune.training.runfolder import CheckpointError, holds_run, locate, read_args
from layerprune.training.structure import random_inputs

__all__ = ["Check", "checked", "data_of", "imported", "random_batches"]

_BATCHES = 4
"""Of random inputs."""


@dataclass(frozen=True)
class Check:
    """How far a checkpoint's compacted network is from the gated one.

    Attributes:
        difference: the largest one; 0.0 is equality bit for bit.
        inputs: what they were compared on, in words.
        without_data: why that was not the test images; None if it was.
    """

    difference: float
    inputs: str
    without_data: str | None


def checked(
    path: str | os.PathLike[str],
    data_dir: Path | None,
    device: torch.device,
    builder: Builder | None = None,
) -> Check:
    """Compares a checkpoint's compacted network with the gated one.

    On the test images where they are at hand; else on random inputs of the shapes in the
    checkpoint.

    Args:
        path: as in `checkpoint.load_model`.
        data_dir: where the data is; None for where the run had it.
        device: where to.
        builder: as in `checkpoint.load_model`.

    Raises:
        CheckpointError: it is missing or damaged, or does not say what the network is called with.
        DataError: there is no such data in ``data_dir``.
    """
    folder = locate(path)
    structure = read_structure(folder)
    try:
        splits = data_of(folder, structure, data_dir)
    except data.DataError as error:
        if data_dir is not None:
            raise
        batches, inputs = random_batches(folder, structure), f"{_BATCHES} random batches"
        without_data = str(error)
    else:
        batches, inputs = test_images(splits), f"{len(splits.test)} test images"
        without_data = None
    try:
        difference = compaction_difference(folder, batches, device, builder)
    except CheckpointError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its network does not run on {inputs}: {what}") from error
    return Check(difference, inputs, without_data)


def data_of(folder: Path, structure: dict[str, Any], data_dir: Path | None) -> data.DataSplits:
    """The data that a checkpoint's network was trained on.

    Raises:
        CheckpointError: the data has other sizes than the network.
        DataError: the checkpoint names none, or it is not in ``data_dir``, nor where the run had
            it.
    """
    if structure["dataset"] not in data.NAMES:
        raise data.DataError(f"{folder} names no known data set")
    if data_dir is None and holds_run(folder.parent):
        data_dir = read_args(folder.parent)[1]
    splits = data.load(structure["dataset"], data_dir)
    kwargs = (structure["builder"] or {}).get("kwargs", {})
    for key in ("num_classes", "in_channels", "image_size"):
        if kwargs.get(key) != getattr(splits, key):
            raise CheckpointError(
                f"{folder} was trained on data with {key} {kwargs.get(key)}, "
                f"{structure['dataset']} in {data_dir} has {getattr(splits, key)}: give another "
                "--data-dir"
            )
    return splits


def random_batches(folder: Path, structure: dict[str, Any]) -> Iterator[Inputs]:
    """Random inputs of the shapes in a checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    if structure["inputs"] is None:
        raise CheckpointError(
            f"{folder} names neither data nor the shapes of inputs: save it with example_inputs"
        )
    generator = torch.Generator().manual_seed(0)
    return (random_inputs(structure["inputs"], generator) for _ in range(_BATCHES))


def imported(name: str) -> Builder:
    """The function that MODULE:FUNCTION means; modules of the working directory are found too.

    Raises:
        CheckpointError: there is none.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (AttributeError, ImportError, ValueError) as error:
        raise CheckpointError(f"builder {name!r} is no MODULE:FUNCTION: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise CheckpointError(f"builder {name!r} is no function")
    return found
