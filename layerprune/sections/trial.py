"""Tries on fake tensors whether a model runs when its sections run on a part of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerprune.cost import Inputs, dry_run
from layerprune.gate import Gate, SectionDraw
from layerprune.sections.base import Section
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
    """Why a model does not run with gates on some sections; None if it does.

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
    for draw in (SectionDraw(gate, slot, running, running[:0]), False):
        for section in sections:
            given = _GivenGate(section.name)
            given.draw = draw
            section.attach(given)
        try:
            found = shapes(dry_run(model, inputs, rows, resized))
        except Exception as error:
            return f"it does not run on a part of the batch ({str(error).partition(chr(10))[0]})"
        finally:
            for section in sections:
                section.detach()
        if found != trace.shapes:
            return "the model's output has another shape when it runs on a part of the batch"
    return None
