"""Activation checkpointing: which draw a section had in the forward that a backward repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layerprune.gate import Gate, SectionDraw


current_backward = torch._C._current_graph_task_id
"""The number of the backward that is running, or `NO_BACKWARD`. No frame for a compiler to see."""

NO_BACKWARD = -1


def is_recomputing() -> bool:
    """Whether a backward is running, where a forward can only be one that it repeats."""
    return current_backward() != NO_BACKWARD


@dataclass
class _Forward:
    """One forward: the numbers of its autograd nodes, and what it drew."""

    start: int
    end: int | None
    draws: dict[Gate, SectionDraw | bool | None]


class DrawLog:
    """The draws of the forwards whose backward is to come.

    Autograd numbers its nodes as they are made, so the node that asks for a recomputation tells
    which forward it belongs to.
    """

    def __init__(self) -> None:
        self._forwards: list[_Forward] = []

    def __bool__(self) -> bool:
        return bool(self._forwards)

    def begin(self, gates: Sequence[Gate]) -> None:
        """Notes what the gates' next forward, one with a graph, will use."""
        draws = {gate: gate.draw for gate in gates}
        self._forwards.append(_Forward(torch.autograd._get_sequence_nr(), None, draws))

    def end(self) -> None:
        """Notes that the forward begun last is over."""
        if self._forwards and self._forwards[-1].end is None:
            self._forwards[-1].end = torch.autograd._get_sequence_nr()

    def clear(self) -> None:
        """Forgets all forwards."""
        self._forwards = []

    def recall(self, gate: Gate) -> SectionDraw | bool | None:
        """The draw that a gate had in the forward that is being repeated.

        Raises:
            RuntimeError: where several forwards wait for their backward, and it cannot be told
                which of them this is.
        """
        if len(self._forwards) == 1:
            return self._forwards[0].draws[gate]
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        for forward in reversed(self._forwards):
            if forward.start <= number:
                if forward.end is None or number < forward.end:
                    return forward.draws[gate]
                break
        if not self._forwards:
            return gate.draw
        raise RuntimeError(
            f"section {gate.name!r} is recomputed in a backward, and it cannot be told for which "
            f"of {len(self._forwards)} forwards: call backward after each forward, or checkpoint "
            "with use_reentrant=False and not within another checkpoint"
        )
