"""Tries whether a model runs with gates on its sections, and without these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from layerprune.gate import Gate, SectionDraw
from layerprune.sections.base import Section
from layerprune.sections.recording import Recording, shapes
from layerprune.sections.removal import children_of, put_back, remove, remove_emptied

_LEFT_OUT = 2
"""Rows on which the sections do not run."""


class _GivenGate(Gate):
    """A gate that shows what it was given, also in evaluation."""

    __slots__ = ()

    def current(self, training: bool, batch_size: int | None) -> SectionDraw | bool:
        return self.draw


def failure(recording: Recording, sections: Sequence[Section]) -> str | None:
    """Why a model does not run with gates on some sections, or without them; None if it does.

    Args:
        recording: of its forward without gates.
        sections: to try; those that have gates already are known to run.
    """
    runs, wider = recording.runs, recording.wider
    sections = [section.in_model(runs.model) for section in sections if not section.is_gated]
    parameter = next(runs.model.parameters(), None)
    device = parameter.device if runs.real and parameter is not None else "cpu"
    trials = {
        "on a part of the batch": _gated(sections, _drawn(wider.rows, device)),
        "with closed gates": _gated(sections, False),
        "without it": _removed(runs.model, sections, blocks=False),
        "without its block": _removed(runs.model, sections, blocks=True),
    }
    for circumstance, prepared in trials.items():
        try:
            with prepared:
                found = shapes(runs.run(wider.rows, recording.resized))
        except Exception as error:
            return f"it does not run {circumstance} ({str(error).partition(chr(10))[0]})"
        if found != wider.shapes:
            return f"the model's output has another shape when it runs {circumstance}"
    return None


def _drawn(rows: int, device: torch.device | str) -> SectionDraw:
    """A draw in which the last rows do not run."""
    places = torch.arange(rows, device=device)
    running = places[: rows - _LEFT_OUT]
    gate = (places < len(running)).float()
    slot = torch.where(gate > 0, places, -1).int()
    return SectionDraw(gate, slot, running, running[:0])


@contextmanager
def _gated(sections: Sequence[Section], draw: SectionDraw | bool) -> Iterator[None]:
    """Gates on sections that show one draw."""
    with ExitStack() as undone:
        for section in sections:
            gate = _GivenGate(section.name)
            gate.draw = draw
            section.attach(gate)
            undone.callback(section.detach)
        yield


@contextmanager
def _removed(model: nn.Module, sections: Sequence[Section], blocks: bool) -> Iterator[None]:
    """A model without sections, and perhaps what they empty, which is whole again afterwards.

    For its shapes alone: a ReLU that may go stays, and caches keep their numbers.
    """
    children = children_of(model)
    handles = []
    try:
        swapped = remove(model, sections, lambda module: False)
        if blocks:
            swapped += remove_emptied(model, sections)
        handles += [module.register_forward_pre_hook(_refuse) for module, _ in swapped]
        yield
    finally:
        for handle in handles:
            handle.remove()
        put_back(children)


def _refuse(module: nn.Module, args: tuple) -> None:
    raise RuntimeError("the model also holds it where no module's name leads to, and calls it")
