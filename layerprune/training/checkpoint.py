"""Checkpoints: a folder with the weights, the network's structure, and what a resumed run needs.

==================  ==============================================================================
model.safetensors   the weights
structure.json      how the dense network is built, which sections are gone, theta of the others,
                    what the network is called with, and checksums of all files
ema.safetensors     the weights' average, where one is kept
training.pt         optimizer, schedule, pruner, random state, place in the run; not in the final
                    model's folder
==================  ==============================================================================

Nothing in them is run when they are read: safetensors, JSON, and a `torch.load` that takes only
tensors and plain containers. Nothing is allocated before it is known to fit the files' sizes. A
folder appears under its name when all of it is on disk, or not at all.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerprune.compaction import branch_keys, remove_sections
from layerprune.gate import Gate
from layerprune.sections import Section
from layerprune.training.builders import Builder, build_on_meta
from layerprune.training.checkpoint_files import (
    read_shapes,
    read_structure,
    read_training,
    read_weights,
    save,
)
from layerprune.training.runfolder import STRUCTURE, TRAINING, WEIGHTS, CheckpointError, locate
from layerprune.training.structure import absent, sections_at, structure_of

__all__ = [
    "STRUCTURE",
    "TRAINING",
    "CheckpointError",
    "absent",
    "check_builder",
    "check_weights",
    "example_inputs",
    "gated_model",
    "load_model",
    "load_weights",
    "read_structure",
    "read_training",
    "read_weights",
    "save",
    "structure_of",
]

# As safetensors names them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
_FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def example_inputs(kwargs: Mapping[str, Any]) -> Tensor:
    """Two empty images of the size that a network was built for."""
    return torch.zeros(2, kwargs["in_channels"], kwargs["image_size"], kwargs["image_size"])


def check_weights(
    model: nn.Module, folder: Path, lacking: Collection[str] = (), name: str = WEIGHTS
) -> None:
    """Refuses a checkpoint's weights that `load_weights` would refuse, by names and shapes alone.

    Args:
        model: the network; not changed.
        folder: the checkpoint.
        lacking: keys that the file does not hold.
        name: the file: that of the weights, or of their average.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in lacking}
    on_meta = any(tensor.is_meta for tensor in state.values())
    problem = _misfit(state, read_shapes(folder, name), on_meta)
    if problem:
        raise CheckpointError(f"{folder / name} does not fit the network of {STRUCTURE}: {problem}")


def load_weights(
    model: nn.Module, folder: Path, lacking: Collection[str] = (), name: str = WEIGHTS
) -> None:
    """Loads a checkpoint's weights into a model of its structure.

    A model on the meta device takes the file's tensors, in their dtypes, for its own.

    Args:
        model: changed in place, or not at all.
        folder: the checkpoint.
        lacking: keys that the file does not hold.
        name: the file: that of the weights, or of their average.

    Raises:
        CheckpointError: as `check_weights`.
    """
    check_weights(model, folder, lacking, name)
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    weights = read_weights(folder, name)
    if on_meta:  # what was read lies in the file, which may change
        weights = {key: tensor.clone() for key, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=on_meta)


def _misfit(
    state: Mapping[str, Tensor],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    any_precision: bool,
) -> str:
    missing = [name for name in state if name not in found]
    if missing:
        return f"{reprlib.repr(missing[0])} and {len(missing) - 1} others are missing"
    foreign = [name for name in found if name not in state]
    if foreign:
        return f"it has no {reprlib.repr(foreign[0])}, nor {len(foreign) - 1} others"
    for name, (dtype, shape) in found.items():
        tensor = state[name]
        expected = {_DTYPES.get(tensor.dtype)}
        if any_precision and expected < _FLOATING:
            expected = _FLOATING
        if shape != tuple(tensor.shape) or dtype not in expected:
            return (
                f"{name!r} is {dtype} {reprlib.repr(shape)}, where the network has "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    return ""


def _dense(
    folder: Path, structure: Mapping[str, Any], builder: Builder | None
) -> tuple[nn.Module, dict[str, Section]]:
    """The dense network and those of its sections that evaluation does not run."""
    try:
        if builder is not None:
            if isinstance(builder, nn.Module) or not callable(builder):
                kind = type(builder).__name__
                raise ValueError(f"builder must be a function that makes the network, got {kind}")
            with torch.random.fork_rng(devices=[]):
                model = builder()
            if not isinstance(model, nn.Module):
                kind = type(model).__name__
                raise ValueError(f"builder must return the dense network, it returned {kind}")
        elif structure["builder"] is None:
            raise ValueError(
                "it names no builder: give one, a function that returns the dense network"
            )
        else:
            model = build_on_meta(**structure["builder"])
        return model, sections_at(model, absent(structure), structure)
    except ValueError as error:
        raise CheckpointError(f"{folder / STRUCTURE}: {error}") from error


def check_builder(structure: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuses a builder by which a checkpoint could not be rebuilt.

    Args:
        structure: from `structure_of`, with a builder.
        weights: what the checkpoint is to hold.

    Raises:
        ValueError: the builder is unknown, or its network is another one.
    """
    model = build_on_meta(**structure["builder"])
    gone = sections_at(model, structure["eliminated"], structure)
    remove_sections(model, list(gone.values()))
    found = {name: (_DTYPES.get(t.dtype, ""), tuple(t.shape)) for name, t in weights.items()}
    problem = _misfit(model.state_dict(), found, any_precision=True)
    if problem:
        raise ValueError(f"builder {structure['builder']} does not build this model: {problem}")


def load_model(
    path: str | os.PathLike[str], builder: Builder | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds the network of a checkpoint, without the script that trained it.

    Args:
        path: a checkpoint's folder, a ``last`` or ``best`` marker, or a run's folder.
        builder: returns the dense network; needed where the checkpoint names none.

    Returns:
        The network, plain, in evaluation mode and on the CPU, without the sections that evaluation
        would not run; and the content of ``structure.json``.

    Raises:
        CheckpointError: it is missing, damaged, or its files do not fit each other.
    """
    folder = locate(path)
    structure = read_structure(folder)
    model, sections = _dense(folder, structure, builder)
    remove_sections(model, [sections[name] for name in structure["eliminated"]])
    load_weights(model, folder)
    remove_sections(
        model, [s for name, s in sections.items() if name not in structure["eliminated"]]
    )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CheckpointError(
            f"{folder / STRUCTURE}: the network has tensors that no file holds: give a builder"
        )
    return model.eval(), structure


def gated_model(path: str | os.PathLike[str], builder: Builder | None = None) -> nn.Module:
    """The dense network of a checkpoint, gated: what the compacted one is to be compared with.

    The gates of the sections that evaluation does not run are at 0. Of the eliminated ones there
    are no weights, and none are needed.

    Args:
        path: as in `load_model`.
        builder: as in `load_model`.

    Raises:
        CheckpointError: as in `load_model`.
    """
    folder = locate(path)
    structure = read_structure(folder)
    model, sections = _dense(folder, structure, builder)
    gone = [sections[name] for name in structure["eliminated"]]
    load_weights(model, folder, branch_keys(model, gone))
    for name, section in sections.items():
        gate = Gate(name)
        gate.is_open = False
        section.attach(gate)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name in [name for name, t in tensors.items() if t is not None and t.is_meta]:
                tensors[name] = None
    return model.eval()
