"""A section's gate: what it sees in one forward, and who watches it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerprune.recomputation import DrawLog, is_recomputing


@dataclass(frozen=True)
class SectionDraw:
    """One section's gates for one batch.

    Attributes:
        gate: float32 ``[B]``; a leaf that requires grad when the section is probed.
        slot: int32 ``[B]``, a row's place in the branch's input, or -1.
        rows: int64 ``[K]``, the rows on which the branch runs, ascending.
        probes: int64 ``[P]``, the rows whose gate gradient is wanted, ascending.
        is_open: whether every gate is 1 and no gradient is wanted.
    """

    gate: Tensor
    slot: Tensor
    rows: Tensor
    probes: Tensor
    is_open: bool = False

    def needs_no_gate(self) -> bool:
        """Whether the section is a plain one for this batch.

        A compiler is not told, as in `runs_whole`.
        """
        return not torch.compiler.is_compiling() and self.is_open

    def runs_whole(self) -> bool:
        """Whether all rows run, so that gathering them can be left out.

        A compiler is not told: it would compile that case, which comes up now and then, apart.
        """
        return not torch.compiler.is_compiling() and self.rows.shape[0] == self.gate.shape[0]


class Gate:
    """The gate of one section.

    ``training`` forwards use ``draw``: a `SectionDraw`, or False where the gate is closed for every
    row, or ``None`` where nothing was drawn; then, and in other forwards, ``is_open`` holds. A copy
    or a pickle of a gate is open and knows nothing of the pruner: a copied model is a plain one.
    """

    __slots__ = (
        "dispatch",
        "draw",
        "forward",
        "is_open",
        "log",
        "name",
        "on_entry",
        "on_exit",
        "owned",
        "recorder",
        "replay",
    )

    def __init__(self, name: str = "section") -> None:
        self.name = name
        self.draw: SectionDraw | Literal[False] | None = None
        self.is_open = True
        self.owned = False
        self.on_entry: Callable[[], None] | None = None
        self.on_exit: Callable[[], None] | None = None
        self.recorder: Callable[[Gate, Tensor], None] | None = None
        self.replay: deque[Tensor] | None = None
        self.log: DrawLog | None = None
        self.dispatch: Callable[..., Tensor] | None = None
        self.forward: Callable[..., Tensor] | None = None

    def __deepcopy__(self, memo: dict) -> Gate:
        return Gate(self.name)

    def __reduce__(self) -> tuple:
        return Gate, (self.name,)

    def current(self, training: bool, batch_size: int | None) -> SectionDraw | bool:
        """The draw to apply, or True for an open and False for a closed gate.

        Args:
            training: whether the section is in training mode.
            batch_size: rows of its input; None where they cannot be told.

        Raises:
            RuntimeError: if the draw was made for another batch size, or cannot be told in a
                recomputation.
        """
        draw = self.draw
        if training and self.log is not None and is_recomputing():
            draw = self.log.recall(self)
        if not training or draw is None:
            return self.is_open
        if isinstance(draw, bool):
            return draw
        if batch_size is not None and draw.gate.shape[0] != batch_size:
            raise RuntimeError(
                f"section {self.name!r} got {batch_size} rows but the gates were drawn for "
                f"{draw.gate.shape[0]}: its input's first dimension is not the model's batch "
                "dimension, or it was called outside the model's forward. Pass it in `ignored`."
            )
        return draw
