"""Tries on fake tensors whether a model runs with gates on its sections, and without these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerprune.cost import Inputs, dry_run
from layerprune.gate import Gate, SectionDraw
from layerprune.sections.base import Section
from layerprune.sections.removal import put, remove, remove_emptied
from layerprune.sections.trace import Trace, shapes

_LEFT_OUT = 2
"""Rows on which the sections do not run."""


class _GivenGate(Gate):
    """A gate that shows what it was given, also in evaluation."""

    __slots__ = ()

    def current(self, training: bool, batch_size: int | None) -> SectionDraw | bool:
        return self.draw


def failure(
    model: nn.Module,
    inputs: Inputs,
    resized: Sequence[Tensor],
    trace: Trace,
    sections: Sequence[Section],
) -> str | None:
    """Why a model does not run with gates on some sections, or without them; None if it does.

    Args:
        model: left as it is.
        inputs: example inputs.
        resized: those of them that carry the batch.
        trace: a forward without gates, of which this is to be another one.
        sections: to try; those that have gates already are known to run.
    """
    sections = [section for section in sections if not section.is_gated]
    rows = trace.rows
    running = torch.arange(rows - _LEFT_OUT, device="cpu")
    gate = (torch.arange(rows, device="cpu") < len(running)).float()
    slot = torch.where(gate > 0, torch.arange(rows, device="cpu"), -1).int()
    draw = SectionDraw(gate, slot, running, running[:0])
    trials = {
        "on a part of the batch": _gated(sections, draw),
        "with closed gates": _gated(sections, False),
        "without it": _removed(model, sections, blocks=False),
        "without its block": _removed(model, sections, blocks=True),
    }
    for circumstance, prepared in trials.items():
        try:
            with prepared:
                found = shapes(dry_run(model, inputs, rows, resized))
        except Exception as error:
            return f"it does not run {circumstance} ({str(error).partition(chr(10))[0]})"
        if found != trace.shapes:
            return f"the model's output has another shape when it runs {circumstance}"
    return None


@contextmanager
def _gated(sections: Sequence[Section], draw: SectionDraw | bool) -> Iterator[None]:
    """Gates on sections that show one draw."""
    for section in sections:
        gate = _GivenGate(section.name)
        gate.draw = draw
        section.attach(gate)
    try:
        yield
    finally:
        for section in sections:
            section.detach()


@contextmanager
def _removed(model: nn.Module, sections: Sequence[Section], blocks: bool) -> Iterator[None]:
    """A model without sections, and perhaps what they empty, which is whole again afterwards."""
    swapped = remove(model, sections, lambda module: False)
    if blocks:
        swapped += remove_emptied(model, sections)
    handles = [module.register_forward_pre_hook(_refuse) for module, _ in swapped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, remainder in reversed(swapped):
            put(model, remainder, module)


def _refuse(module: nn.Module, args: tuple) -> None:
    raise RuntimeError("the model also holds it where no module's name leads to, and calls it")
