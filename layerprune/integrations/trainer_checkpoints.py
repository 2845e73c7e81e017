"""The pruner's state in the checkpoints of transformers' Trainer, and their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerprune.training.untrusted import read_torch

PRUNER_FILE = "layerprune_pruner.pt"
"""The pruner's state in each of the Trainer's checkpoints."""


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Puts a pruner's state into a checkpoint: all of it, or nothing."""
    temporary = folder / f".{PRUNER_FILE}.tmp"
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / PRUNER_FILE)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Loads a checkpoint's weights into a model of its structure.

    Some models are saved under names that they had in earlier versions. The Trainer does not
    translate these, and would go on with weights that it has not loaded.

    Raises:
        ValueError: if the checkpoint does not have them all.
    """
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    own = model.state_dict()
    lost = sorted(set(report["missing_keys"]) & own.keys())
    if lost:
        raise ValueError(f"{folder} lacks weights of the model, such as {lost[0]}")
    model.load_state_dict({n: t for n, t in loaded.state_dict().items() if n in own})


def newest(output_dir: str) -> Path | None:
    """The newest checkpoint that has the pruner's state, or None where there is no checkpoint.

    Raises:
        ValueError: if there are checkpoints, but none has it.
    """
    numbered = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdecimal()
    }
    folders = [numbered[step] for step in sorted(numbered)]
    complete = [folder for folder in folders if (folder / PRUNER_FILE).is_file()]
    if folders and not complete:
        raise ValueError(
            f"no checkpoint in {output_dir} has {PRUNER_FILE}: they were made without "
            "LayerPruningCallback. Take another output_dir"
        )
    return complete[-1] if complete else None


def read(folder: Path) -> dict[str, Any]:
    """The pruner's state from a checkpoint that a run can go on from.

    Raises:
        ValueError: if it is missing or damaged, or the optimizer's state is missing.
    """
    path = folder / PRUNER_FILE
    if not path.is_file():
        raise ValueError(
            f"missing file {path}: the checkpoint is incomplete, or was made without "
            "LayerPruningCallback"
        )
    try:
        state = read_torch(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    if not isinstance(state, dict) or type(state.get("total_steps")) is not int:
        raise ValueError(f"{path} is damaged: it holds no pruner's state")
    if not (folder / OPTIMIZER_NAME).is_file():
        raise ValueError(
            f"missing file {folder / OPTIMIZER_NAME}: no run can go on from a checkpoint that was "
            "saved with save_only_model"
        )
    return state
