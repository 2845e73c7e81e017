"""Checkpoints for a training loop of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from layerprune.calls import Inputs
from layerprune.pruner import LayerPruner
from layerprune.training import checkpoint
from layerprune.training.builders import Builder
from layerprune.training.runfolder import locate
from layerprune.training.untrusted import what_failed

__all__ = ["load", "restore", "save"]


def save(
    path: str | os.PathLike[str],
    pruner: LayerPruner,
    *,
    builder: tuple[str, Mapping[str, Any]] | None = None,
    example_inputs: Inputs | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint of a network that is pruned, or was.

    An older checkpoint under the same name stays until the new one is on disk. Under
    torch.distributed all ranks call this; the first one writes, the others wait for it.

    Args:
        path: the checkpoint's folder.
        pruner: the pruner of the network, before `LayerPruner.strip` or after it.
        builder: what makes the dense network, so that `load` needs no script: a name of
            `layerprune.models` or ``"torchvision.NAME"``, and its keyword arguments.
        example_inputs: what the network is called with; shapes and dtypes are kept.
        training: what a resumed run needs besides (the optimizer's ``state_dict()``, the step):
            tensors, numbers, text and containers of them. The pruner's own state goes along. None
            for a checkpoint from which no run goes on.

    Raises:
        FileExistsError: if the path is a file, or a folder that is no checkpoint.
        TypeError: if an example input can not be described, or builder or training is none.
        ValueError: if the builder does not build this network, ``training`` holds something else,
            or the network was renumbered.
        FirstRankFailed: on the other ranks, where the first one cannot write.
    """
    if pruner.renumbered:
        raise ValueError(
            "the model was renumbered, and no longer has the names by which it is rebuilt: save it "
            "before strip(renumber=True)"
        )
    if builder is not None:
        plain = isinstance(builder, tuple | list) and len(builder) == 2
        if not (plain and isinstance(builder[0], str) and isinstance(builder[1], Mapping)):
            raise TypeError(
                "builder must be a name and its keyword arguments, as "
                f'("torchvision.resnet18", {{"num_classes": 10}}), got {builder!r}'
            )
    if not (training is None or isinstance(training, Mapping)):
        raise TypeError(f"training must be a mapping or None, got {type(training).__name__}")
    folder = Path(path)
    named = None if builder is None else {"name": builder[0], "kwargs": dict(builder[1])}
    structure = checkpoint.structure_of(named, None, example_inputs, **pruner.structure())
    weights = pruner.model.state_dict()
    if named is not None:
        checkpoint.check_builder(structure, weights)
    if training is not None:
        training = {"pruner": pruner.state_dict(), "training": dict(training)}

    def write() -> None:
        if folder.exists() and not (folder / checkpoint.STRUCTURE).is_file():
            if not folder.is_dir() or any(folder.iterdir()):
                raise FileExistsError(f"{folder} is no checkpoint: choose another path")
        checkpoint.save(folder, weights, structure, training)

    pruner.ranks.first_alone(write)


def load(path: str | os.PathLike[str], builder: Builder | None = None) -> nn.Module:
    """Rebuilds the network of a checkpoint, without the script that trained it.

    Args:
        path: a checkpoint's folder, a ``last`` or ``best`` marker, or a run's folder.
        builder: returns the dense network; needed where the checkpoint names none.

    Returns:
        The network, plain, in evaluation mode and on the CPU, without the sections that evaluation
        would not run.

    Raises:
        CheckpointError: it is missing, damaged, or its files do not fit each other.
    """
    return checkpoint.load_model(path, builder)[0]


def restore(path: str | os.PathLike[str], pruner: LayerPruner) -> dict[str, Any]:
    """Goes on from a checkpoint of `save`: gives a pruner and its model their state back.

    Make the pruner as for the first run, on the dense model, and the optimizer after this call.

    Args:
        path: the checkpoint's folder.
        pruner: has done no step yet.

    Returns:
        What `save` was given as ``training``.

    Raises:
        CheckpointError: it is missing, damaged, or its files do not fit each other, or the pruner.
            Neither the pruner nor the model is changed then.
    """
    folder = locate(path)
    state = checkpoint.read_training(folder)
    if "training" not in state:
        raise checkpoint.CheckpointError(
            f"{folder / checkpoint.TRAINING} was not written by layerprune.save: go on with this "
            "run by layerprune train --resume"
        )
    # Nothing is changed before all files are known to be whole and to fit.
    try:
        gone = pruner.keys_gone(state.get("pruner"))
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"{folder / checkpoint.TRAINING} is of another run: {what_failed(error)}"
        ) from error
    checkpoint.check_weights(pruner.model, folder, gone)
    checkpoint.read_weights(folder)
    pruner.load_state_dict(state["pruner"])
    checkpoint.load_weights(pruner.model, folder)
    return state["training"]
