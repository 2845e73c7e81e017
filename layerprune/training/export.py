"""Export: a plain network as a program that needs no layerprune, checked against the module.

A file appears under its name when it is whole and has been compared with the module, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_map

from layerprune.calls import (
    Inputs,
    as_call,
    batch_size_of,
    batch_tensors,
    evaluating,
    plain_attention,
)
from layerprune.sections import GatedResidual
from layerprune.sections.residual import GATE_ATTRIBUTE
from layerprune.training.export_formats import FORMATS, Call, ExportError, first_line, tensors_of

__all__ = ["ExportError", "check_absent", "export"]


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    format: str,
    batch: int | None = None,
) -> float:
    """Writes what a model computes in evaluation mode, and compares the file with the model.

    Args:
        model: on the CPU and without gates, as `LayerPruner.strip` leaves it; not changed.
        example_inputs: what it is called with. The first tensor's first dimension is the batch, and
            so is that of every tensor with as many rows.
        path: the file to write; it must not exist.
        format: ``"torch"`` for a `torch.export` archive (.pt2), ``"onnx"`` for an ONNX file.
        batch: rows of every later call; None for any number of rows.

    Returns:
        The largest absolute difference between the file's outputs and the model's, on random inputs
        of two batch sizes (of one where ``batch`` says which).

    Raises:
        ValueError: if the model has gates or is elsewhere than on the CPU, or an argument is out of
            its range.
        FileExistsError: if there is something at ``path``.
        ModuleNotFoundError: if a package of the extra ``export`` is missing.
        ExportError: if the model cannot be exported, or the file differs from it by more than
            rounding. There is no file then.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be a whole number >= 1, or None, got {batch!r}")
    if batch_size_of(example_inputs) < 1:
        raise ValueError("example_inputs have no row: give at least one")
    _check_plain(model)
    check_absent(path)
    write = FORMATS[format]()
    # The compiler takes what has one row, or as many as something else, for a constant.
    rows = batch or max(2, batch_size_of(example_inputs))
    sizes = (1, rows + 1) if batch is None else (rows,)
    with torch.no_grad(), evaluating(model), plain_attention(), _appearing(path) as temporary:
        inputs = _with_rows(example_inputs, rows)
        program, shapes = _program(model, inputs, dynamic=batch is None)
        call = write(program, shapes, temporary)
        cases = [_randomised(_with_rows(example_inputs, size), seed=size) for size in sizes]
        return max(_difference(model, call, as_call(case), path) for case in cases)


def check_absent(path: Path) -> None:
    """Refuses a place that is taken.

    Raises:
        FileExistsError: it is.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: remove it, or choose another name")


def _check_plain(model: nn.Module) -> None:
    gated = [
        name
        for name, module in model.named_modules()
        if GATE_ATTRIBUTE in vars(module)
        and not (isinstance(module, GatedResidual) and not vars(module)[GATE_ATTRIBUTE].owned)
    ]
    if gated:
        raise ValueError(
            f"the model still has gates, at {gated[0]!r} for one: export what the pruner's strip() "
            "returns"
        )
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise ValueError(f"the model is on {', '.join(sorted(devices))}: export model.cpu()")


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write to: what is there at the end without an error appears at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _with_rows(inputs: Inputs, rows: int) -> Inputs:
    """The inputs with this number of rows, those that there are over and over."""
    chosen = set(map(id, batch_tensors(inputs)))
    index = torch.arange(rows) % batch_size_of(inputs)
    return tree_map(lambda leaf: leaf[index] if id(leaf) in chosen else leaf, inputs)


def _randomised(inputs: Inputs, seed: int) -> Inputs:
    """The inputs with random numbers in place of all floating-point ones that carry the batch."""
    chosen = set(map(id, batch_tensors(inputs)))
    generator = torch.Generator().manual_seed(seed)

    def random(leaf: Any) -> Any:
        if id(leaf) not in chosen or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    return tree_map(random, inputs)


def _program(model: nn.Module, inputs: Inputs, dynamic: bool) -> tuple[ExportedProgram, Any]:
    """What `torch.export` makes of a model, and which dimensions it keeps open."""
    args, kwargs = as_call(inputs)
    shapes = ShapesCollection()
    if dynamic:
        size = Dim("batch")
        for tensor in batch_tensors(inputs):
            shapes[tensor] = {0: size}
    try:
        open_dimensions = shapes.dynamic_shapes(model, args, kwargs) if dynamic else None
        program = torch.export.export(model, args, kwargs, dynamic_shapes=open_dimensions)
    except Exception as error:  # torch has no common class for what it cannot export
        hint = "; with a fixed batch size it may" if dynamic else ""
        raise ExportError(
            f"torch.export does not take {type(model).__name__}{hint}: {first_line(error)}"
        ) from error
    return program, open_dimensions


def _difference(model: nn.Module, call: Call, inputs: tuple[tuple, dict], path: Path) -> float:
    """Largest difference between a model's outputs and those of its exported form.

    Half of the digits of the outputs' type have to be right: what a wrong operation costs, and the
    order of a sum does not.

    Raises:
        ExportError: they are not, or there are none.
    """
    args, kwargs = inputs
    expected = tensors_of(model(*args, **kwargs))
    try:
        found = call(args, kwargs)
    except Exception as error:  # of torch or of onnxruntime, of whatever kind
        raise ExportError(
            f"the exported network does not run with {batch_size_of(inputs)} rows: "
            f"{first_line(error)}"
        ) from error
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        raise ExportError(f"the exported network returns outputs of other shapes: no {path}")
    worst = 0.0
    for right, ours in zip(expected, found, strict=True):
        if not right.numel() or right.equal(ours):
            continue
        exact = right.double()
        difference = float((exact - ours.double()).abs().nan_to_num(torch.inf).max())
        digits = torch.finfo(right.dtype).eps ** 0.5 if right.is_floating_point() else 0.0
        if not difference <= digits * float(exact.abs().max()):
            raise ExportError(
                f"the exported network differs from the module by {difference:g}, where outputs "
                f"are up to {float(exact.abs().max()):g}: no {path}"
            )
        worst = max(worst, difference)
    return worst
