"""The files that a program is exported to: how each is written, and run again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

__all__ = ["FORMATS", "Call", "ExportError", "first_line", "tensors_of"]

Call = Callable[[tuple, dict], list[Tensor]]
"""Runs a network on positional and keyword arguments."""


class ExportError(RuntimeError):
    """A model that cannot be exported, or whose exported form computes something else."""


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in any nest of containers, in their order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def first_line(error: Exception) -> str:
    """What an error says, without torch's advice."""
    return str(error).partition("\n")[0] or type(error).__name__


def _torch_writer() -> Callable[[ExportedProgram, Any, Path], Call]:
    def write(program: ExportedProgram, shapes: Any, path: Path) -> Call:
        # By a file object: torch warns of a path that does not end in .pt2.
        with open(path, "wb") as file:
            torch.export.save(program, file)
        with open(path, "rb") as file:
            module = torch.export.load(file).module()
        return lambda args, kwargs: tensors_of(module(*args, **kwargs))

    return write


def _onnx_writer() -> Callable[[ExportedProgram, Any, Path], Call]:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{package} is missing: pip install layerprune[export]", name=package
            ) from error
    import onnxruntime

    def write(program: ExportedProgram, shapes: Any, path: Path) -> Call:
        try:
            # The shapes are in the program; here they give the open dimension its name.
            made = torch.onnx.export(program, dynamic_shapes=shapes, dynamo=True, verbose=False)
            made.save(path, external_data=False)
        except OSError:
            raise
        except Exception as error:  # of torch.onnx, onnxscript or protobuf
            raise ExportError(
                f"torch.onnx does not take this model: {first_line(error)}"
            ) from error

        def call(args: tuple, kwargs: dict) -> list[Tensor]:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]
            arrays = [tensor.numpy() for tensor in tensors_of((args, kwargs))]
            found = session.run(None, dict(zip(names, arrays, strict=True)))
            return [torch.from_numpy(array) for array in found]

        return call

    return write


FORMATS = {"torch": _torch_writer, "onnx": _onnx_writer}
"""By name, what makes the function that writes a program to a path and reads it back."""
