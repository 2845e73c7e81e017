"""Whole-section differences C(on) - C(off): the judge that the eliminations rest on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerprune import ops
from layerprune.gates import Gate

_PATH_STREAM = 1 << 61
"""Sets the random stream of the output path apart from the one of the gates."""


@contextmanager
def side_forward(model: nn.Module) -> Iterator[None]:
    """Lets a forward leave no trace: no graph, buffers and random state as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, saved in buffers:
                buffer.copy_(saved)


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
    values = []
    for is_open in (True, False):
        with side_forward(model), forced(gate, is_open):
            values.append(float(loss()))
    return values[0] - values[1]


@dataclass
class OutputPath:
    """Measures a whole-section difference in one training step, whatever the user's loss is.

    Two forwards of the batch, with the section on and off, give the outputs' straight path
    ``out(t) = off + t (on - off)``. The training step is given ``out(t_b)`` for row b, t_b stratified on
    (0, 1); by the fundamental theorem of calculus the row's <dl_b/dout, on - off> has the mean
    l_b(on) - l_b(off). No row of the other end enters the gradients of the weights.

    Attributes:
        index: the section measured.
        other: outputs of the end that the training forward does not compute, flattened.
        sign: +1 if that end is the one with the section on.
        weights: float32 ``[B]``, each row's place on the path, from the training forward's end.
        rows_factor: what turns dC/dout of a row into the derivative of the row's own loss.
        seconds: time the other forward took.
    """

    index: int
    other: list
    sign: float
    weights: Tensor
    rows_factor: float
    per_row: Tensor | None = None
    common: Tensor | None = None

    @classmethod
    def begin(
        cls,
        index: int,
        gate: Gate,
        model: nn.Module,
        call: tuple[tuple, dict],
        *,
        other_is_on: bool,
        rng: tuple[int, int],
        batch_size: int,
        rows_factor: float,
    ) -> OutputPath:
        """Runs the other end's forward, ahead of the training forward."""
        args, kwargs = call
        with side_forward(model), forced(gate, other_is_on):
            # `forward`, not a call: the pruner's hooks must not draw for it.
            other, _ = tree_flatten(model.forward(*args, **kwargs))
        state = torch.tensor([rng[0] ^ _PATH_STREAM, rng[1], 0])
        weights = ops.sample_gates(torch.zeros(1), batch_size, state, torch.ones(1)).gates[0]
        return cls(index, other, 1.0 if other_is_on else -1.0, weights, rows_factor)

    def mix(self, output: object) -> object:
        """The training forward's output, moved along the path; its gradient becomes the evidence."""
        leaves, spec = tree_flatten(output)
        mixed = [
            self._move(leaf, other) if _carries_gradient(leaf) else leaf
            for leaf, other in zip(leaves, self.other, strict=True)
        ]
        self.other = []
        return tree_unflatten(mixed, spec)

    def _move(self, leaf: Tensor, other: Tensor) -> Tensor:
        away = (other - leaf).detach()
        batch = self.weights.shape[0]
        by_row = leaf.dim() > 0 and leaf.shape[0] == batch
        weights = self.weights.to(leaf.device)
        place = weights.view(-1, *[1] * (leaf.dim() - 1)) if by_row else weights[0]
        moved = leaf + (place * away).to(leaf.dtype)

        def record(gradient: Tensor) -> None:
            product = gradient.detach().double() * away.double()
            if by_row:
                rows = product.flatten(1).sum(1) * (self.sign * self.rows_factor)
                self.per_row = rows if self.per_row is None else self.per_row + rows
            else:
                whole = product.sum() * self.sign
                self.common = whole if self.common is None else self.common + whole

        moved.register_hook(record)
        return moved

    def result(self, scale: float = 1.0) -> tuple[float, float, int] | None:
        """Mean, variance of the mean (NaN without rows) and rows; None if no gradient came.

        Args:
            scale: divisor of the gradients, as a gradient scaler's.
        """
        if self.per_row is None and self.common is None:
            return None
        common = 0.0 if self.common is None else float(self.common) / scale
        if self.per_row is None:
            return common, math.nan, 0
        rows = self.per_row / scale
        count = rows.shape[0]
        variance = float(rows.var()) / count if count > 1 else math.nan
        return float(rows.mean()) + common, variance, count


def _carries_gradient(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
