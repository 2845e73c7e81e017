"""Gated modules of a branch section, and what they tell each other in a forward.

Imported when the first gate is attached, as `twins` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch._dynamo.decorators import maybe_mark_dynamic

from layerprune import ops
from layerprune.gate import Gate, SectionDraw
from layerprune.recomputation import NO_BACKWARD, current_backward
from layerprune.sections.arithmetic import fills_cache, graded, running_rows
from layerprune.sections.branch import Link
from layerprune.sections.placeholders import in_place, nothing
from layerprune.sections.residual import GATE_ATTRIBUTE
from layerprune.sections.twins import aside, empty, outside, unregistered


class Passage:
    """One section's way through a forward, from its first module to its last.

    Args:
        gate: the section's gate.
        first: its first module.
        last: its last one, which may be the same.
        shaped: as in `BranchSection`.
    """

    def __init__(self, gate: Gate, first: Link, last: Link, shaped: bool) -> None:
        self.gate = gate
        self._first = first
        self._last = last
        self._shaped = shaped
        self._draw: SectionDraw | bool = True
        self._replays = False

    @outside
    def through(
        self,
        link: Link,
        module: nn.Module,
        forward: Callable[..., object],
        args: tuple,
        kwargs: dict,
    ) -> object:
        """Runs one module on what the section's draw leaves for it to do.

        Args:
            link: how the module is called.
            module: the module.
            forward: its original forward.
            args: what it is called with.
            kwargs: what it is called with, by name.
        """
        key = link.keys[0]
        x = args[key] if isinstance(key, int) else kwargs[key]
        repeated = current_backward() != NO_BACKWARD  # nobody watches a recomputation
        if link is self._first and not repeated:
            aside(self._enter, module.training, x)
        draw = aside(self._draw_now, module.training, repeated)
        if draw is False:
            if aside(fills_cache, module, args, kwargs):
                forward(*args, **kwargs)
            result = aside(self._skipped, link, x)
        elif draw is True:
            result = forward(*args, **kwargs)
        else:
            args, kwargs = aside(self._taken, draw, link, x, args, kwargs)
            result = forward(*args, **kwargs)
            if link is self._last:
                result = aside(_gated, draw, link, result)
        if link is self._last and not repeated:
            result = aside(self._leave, result)
        return result

    def _draw_now(self, training: bool, repeated: bool) -> SectionDraw | bool:
        """The draw, True where there is no need of it, and False where nothing is to run."""
        # A recomputation may begin behind the first module.
        draw = self.gate.current(training, None) if repeated else self._draw
        if self._replays and not repeated:
            return False
        return draw if isinstance(draw, bool) or not draw.needs_no_gate() else True

    def _skipped(self, link: Link, x: Tensor) -> object:
        value = nothing(x, self._shaped) if link is self._last else x
        return in_place(value, link.place, link.width)

    def _enter(self, training: bool, x: Tensor) -> None:
        gate = self.gate
        self._replays = bool(gate.replay)
        if self._replays:
            return
        if gate.on_entry is not None:
            gate.on_entry()
        self._draw = gate.current(training, x.shape[0])

    def _taken(
        self, draw: SectionDraw, link: Link, x: Tensor, args: tuple, kwargs: dict
    ) -> tuple[Sequence, dict]:
        """The running rows of a module's arguments; from the first one on its input is of these."""
        if draw.runs_whole():
            return args, kwargs
        rows = ops.take_rows(x, draw.rows)[0] if link is self._first else x
        maybe_mark_dynamic(rows, 0)
        given = {**dict(enumerate(args)), **kwargs}
        others = {key: value for key, value in given.items() if key not in link.keys}
        given |= running_rows(others, draw, link.batched, link.shared)
        given |= dict.fromkeys(link.keys, rows)
        return [given.pop(position) for position in range(len(args))], given

    def _leave(self, result: object) -> object:
        gate, link = self.gate, self._last
        if self._replays:
            return in_place(gate.replay.popleft(), link.place, link.width)
        if gate.on_exit is not None:
            gate.on_exit()
        if gate.recorder is not None:
            gate.recorder(gate, result if link.width is None else result[link.place])
        return result


def _gated(draw: SectionDraw, link: Link, result: object) -> object:
    """A branch's result with its output on all rows, gated: zero where it did not run."""
    y = result if link.width is None else result[link.place]
    zeros = y.new_zeros(()).expand(draw.gate.shape[0], *y.shape[1:])
    slot = None if draw.runs_whole() else draw.slot
    y = ops.gated_residual(zeros, y, graded(draw), slot, gate_grad_rows=draw.probes)
    if link.width is None:
        return y
    return tuple(y if place == link.place else each for place, each in enumerate(result))


class BranchTwin:
    """Mixin that lets a module run on the rows for which its branch section runs."""

    __init_subclass__ = unregistered

    @outside
    def forward(self, *args: object, **kwargs: object) -> object:
        """Runs the module on the running rows."""
        link, passage = getattr(self, GATE_ATTRIBUTE)
        return passage.through(link, self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # As with `OpaqueTwin`.
        return empty, (type(self).__mro__[2], BranchTwin), super().__reduce_ex__(protocol)[2]
