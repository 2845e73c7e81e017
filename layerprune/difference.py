"""Whole-section differences C(on) - C(off): the judge that the eliminations rest on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerprune import ops
from layerprune.elimination import Measurement
from layerprune.gate import Gate
from layerprune.side_forward import RandomState, side_forward
from layerprune.transfer import HostCopy, to_device

_PATH_STREAM = 1 << 61
"""Sets the random stream of the output path apart from the one of the gates."""


@contextmanager
def forced(gate: Gate, is_open: bool) -> Iterator[None]:
    """Opens or closes a gate for all rows, in training and in evaluation mode."""
    draw, was_open = gate.draw, gate.is_open
    gate.draw, gate.is_open = None, is_open
    try:
        yield
    finally:
        gate.draw, gate.is_open = draw, was_open


def measured_difference(model: nn.Module, gate: Gate, loss: Callable[[], Tensor]) -> float:
    """C with the section on for every row minus C with it off, all else equal.

    Args:
        model: holds the section; its buffers and the random state stay as they are.
        gate: the section's gate.
        loss: computes the loss of one fixed batch with the model; it must not draw gates anew.

    Returns:
        The difference of the two losses.
    """
    values, leaving = [], RandomState(model)
    for is_open in (True, False):
        # Whatever the section itself draws, what follows has the same dropout masks.
        gate.on_exit = leaving.capture if is_open else leaving.restore
        with side_forward(model), forced(gate, is_open):
            values.append(float(loss()))
        gate.on_exit = None
    return values[0] - values[1]


class OutputPath:
    """Measures a whole-section difference in one training step, whatever the user's loss is.

    Beside the training forward, which has the section on or off for every row, a second one without
    gradient gives the outputs at the other end. The training step is handed ``out(t_b)`` for row b
    on the straight path ``out(t) = off + t (on - off)``, t_b stratified on (0, 1); by the
    fundamental theorem of calculus the row's <dl_b/dout, on - off> has the mean l_b(on) - l_b(off).
    The second forward starts at the section: what comes before it is the same in both.

    Args:
        index: the section measured.
        gate: its gate.
        gates: all gates of the model.
        model: the model, just ahead of its training forward.
        trained_on: whether the training forward has the section on.
        rng: seed and number that t is drawn by.
        rows: first and last but one of the batch's rows among those of all ranks, and their number.
        rows_factor: what turns dC/dout of a row into the derivative of the row's own loss.
    """

    def __init__(
        self,
        index: int,
        gate: Gate,
        gates: Sequence[Gate],
        model: nn.Module,
        *,
        trained_on: bool,
        rng: tuple[int, int],
        rows: tuple[int, int, int],
        rows_factor: float,
    ) -> None:
        self.index = index
        self.trained_on = trained_on
        self.waiting = True
        self._gate = gate
        self._gates = gates
        self._sign = -1.0 if trained_on else 1.0
        self._rows_factor = rows_factor
        state = torch.tensor([rng[0] ^ _PATH_STREAM, rng[1], 0], device="cpu")
        every_row = torch.ones(1, device="cpu")
        first, end, total = rows
        self._t = ops.sample_gates(1 - every_row, total, state, every_row).gates[0][first:end]
        self._earlier: dict[Gate, deque[Tensor]] = {}
        self._per_row: Tensor | None = None
        self._common: Tensor | None = None
        # The same dropout masks at both ends: the second forward starts from the same random state,
        # and takes it up again where the section begins and ends, whatever is drawn in between.
        self._start, self._entry, self._exit = (RandomState(model) for _ in range(3))
        gate.on_entry, gate.on_exit = self._reach, self._leave
        for other in gates:
            other.recorder = self._record

    def _reach(self) -> None:
        self._gate.on_entry = None
        self._stop_recording()
        self._entry.capture()

    def _leave(self) -> None:
        self._gate.on_exit = None
        self._exit.capture()

    def _record(self, gate: Gate, output: Tensor) -> None:
        # A copy: what comes next may work in place.
        self._earlier.setdefault(gate, deque()).append(output.detach().clone())

    def _stop_recording(self) -> None:
        for gate in self._gates:
            gate.recorder = None

    def abandon(self) -> None:
        """Takes back what was asked of the gates: no output will come."""
        self._stop_recording()
        self._gate.on_entry = self._gate.on_exit = None

    def replayed(self) -> set[Gate]:
        """The gates whose sections the other end does not compute again."""
        return set(self._earlier)

    def finish(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        """Computes the other end and moves the training forward's output along the path.

        Returns:
            The output to train with; its gradient becomes the evidence.
        """
        self.waiting = False
        self._stop_recording()
        for gate, outputs in self._earlier.items():
            gate.replay = outputs
        self._gate.on_entry, self._gate.on_exit = self._entry.restore, self._exit.restore
        try:
            with side_forward(model), forced(self._gate, not self.trained_on):
                self._start.restore()
                # `forward`, not a call: the pruner's hooks must not draw for it.
                others, _ = tree_flatten(model.forward(*args, **kwargs))
        finally:
            self._gate.on_entry = self._gate.on_exit = None
            for gate in self._earlier:
                gate.replay = None
        leaves, spec = tree_flatten(output)
        mixed = [
            self._move(leaf, other) if _carries_gradient(leaf) else leaf
            for leaf, other in zip(leaves, others, strict=True)
        ]
        return tree_unflatten(mixed, spec)

    def _move(self, leaf: Tensor, other: Tensor) -> Tensor:
        away = (other - leaf).detach()
        by_row = leaf.dim() > 0 and leaf.shape[0] == self._t.shape[0]
        # A number of the host goes along with any device's tensors.
        (t,) = to_device([self._t], leaf.device) if by_row else [self._t[0]]
        place = t.view(-1, *[1] * (leaf.dim() - 1)) if by_row else t
        moved = leaf + (place * away).to(leaf.dtype)

        def record(gradient: Tensor) -> None:
            product = gradient.detach().double() * away.double()
            if by_row:
                rows = product.reshape(product.shape[0], -1).sum(1) * (
                    self._sign * self._rows_factor
                )
                self._per_row = rows if self._per_row is None else self._per_row + rows
            else:
                whole = product.sum() * self._sign
                self._common = whole if self._common is None else self._common + whole

        moved.register_hook(record)
        return moved

    def result(self) -> PendingMeasurement | None:
        """The measurement, on its way to the host, or None if no gradient came."""
        if self._per_row is None and self._common is None:
            return None
        return PendingMeasurement(self.index, self._per_row, self._common)


class PendingMeasurement:
    """One batch's whole-section difference, on its way to the host.

    Args:
        section: the section measured.
        per_row: float64 ``[B]``, each row's difference, or None.
        common: float64 scalar, what the rows share, or None.
    """

    def __init__(self, section: int, per_row: Tensor | None, common: Tensor | None) -> None:
        self.section = section
        self._kinds = [kind is not None for kind in (per_row, common)]
        self._copy = HostCopy([kind for kind in (per_row, common) if kind is not None])

    def get(self, scale: float = 1.0) -> Measurement:
        """The measurement.

        Args:
            scale: divisor of the gradients, as a gradient scaler's.
        """
        arrived = iter(self._copy.get())
        rows, common = (next(arrived) if there else None for there in self._kinds)
        common = 0.0 if common is None else float(common) / scale
        if rows is None:
            return Measurement(common, math.nan, math.nan, 0)
        rows = rows / scale
        count = rows.shape[0]
        mean = rows.mean()
        third = float((rows - mean).pow(3).mean())
        variance = float(rows.var()) / count if count > 1 else math.nan
        return Measurement(float(mean) + common, variance, third, count)


def _carries_gradient(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
