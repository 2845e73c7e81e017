"""Gated subclasses, and the seam at which a section leaves the model's compiled code.

Which of its forms a section takes changes from batch to batch, and so does who watches it: a
compiler that looked at that would compile without end. It is shown the arithmetic alone, a function
of the draw's tensors, of which each section has a copy: compilers count by the code object.

Imported when the first gate is attached: importing the compiler takes its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic

from layerprune.gate import Gate, SectionDraw
from layerprune.recomputation import NO_BACKWARD, current_backward
from layerprune.sections.arithmetic import fills_cache, opaque_forward, residual_forward
from layerprune.sections.residual import GATE_ATTRIBUTE

_LEAST_COMPILED = 2
"""Rows: a compiler would compile a dimension of 0 or 1 apart."""


@torch.compiler.disable
def aside(function: Callable[..., object], *args: object) -> object:
    """Calls a function, and lets no compiler see what happens in it."""
    return function(*args)


outside = functools.partial(
    torch.compiler.disable,
    recursive=False,
    reason="which form a section takes is decided outside compiled code",
)
"""Keeps a function's own frame out of compiled code, but not what it calls."""


@outside
def run_section(
    module: nn.Module, gate: Gate, forward: Callable[..., Tensor], x: Tensor, *parts: object
) -> Tensor:
    """Runs a section's arithmetic, or repeats what an earlier run on the same batch gave.

    Args:
        module: the section.
        gate: its gate.
        forward: the arithmetic: of a draw, ``x`` and ``parts``.
        x: the section's input.
        parts: what else the arithmetic takes.
    """
    repeated = current_backward() != NO_BACKWARD  # nobody watches a recomputation
    if not repeated:
        if gate.replay:
            return gate.replay.popleft()
        if gate.on_entry is not None:
            aside(gate.on_entry)
    draw = aside(gate.current, module.training, x.shape[0])
    if gate.forward is None:
        gate.forward = _own_copy(forward, gate.name)
    run = gate.forward
    if isinstance(draw, SectionDraw) and draw.rows.shape[0] >= _LEAST_COMPILED:
        maybe_mark_dynamic(draw.rows, 0)
        # Only operators of this package see how many probes there are.
        mark_unbacked(draw.probes, 0)
    elif draw is not True and module._compiled_call_impl is None:
        # Not worth a compilation, but where the section is to be compiled in any case.
        run = functools.partial(aside, forward)
    output = run(draw, x, *parts)
    if not repeated:
        if gate.on_exit is not None:
            aside(gate.on_exit)
        if gate.recorder is not None:
            aside(gate.recorder, gate, output)
    return output


def _own_copy(forward: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    label = f"section {name}"
    code = forward.__code__.replace(co_name=label)
    return FunctionType(code, forward.__globals__, label)


def unregistered(cls: type, **_: object) -> None:
    """What a twin's mixin has for ``__init_subclass__``: no base hears of a twin."""


class ResidualTwin:
    """Mixin that puts the dispatch of a `GatedResidual` outside compiled code."""

    __init_subclass__ = unregistered

    @outside
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, *S]`` to ``[B, *S']``."""
        gate = getattr(self, GATE_ATTRIBUTE)
        parts = (self.branch, self.shortcut, self.activation)
        return run_section(self, gate, residual_forward, x, *parts)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # A copy has no pruner.
        return empty, (type(self).__mro__[2],), super().__reduce_ex__(protocol)[2]


class OpaqueTwin:
    """Mixin that puts a gate around the forward of the class it is mixed into."""

    __init_subclass__ = unregistered

    @outside
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor | tuple:
        """Runs the module on the running rows and mixes the result with its input."""
        adapter, gate = getattr(self, GATE_ATTRIBUTE)
        whole = super().forward
        others = (None,) * ((adapter.width or 1) - 1)

        def first(*args: object, **kwargs: object) -> Tensor:
            nonlocal others
            y, *others = whole(*args, **kwargs)
            return y

        run = whole if adapter.width is None else first
        filling = aside(fills_cache, self, args, kwargs)
        parts = (run, adapter.batched, adapter.shared, filling, args, kwargs)
        y = run_section(self, gate, opaque_forward, x, *parts)
        return y if adapter.width is None else (y, *others)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The twin's class exists only in memory: name it by its original.
        return empty, (type(self).__mro__[2], OpaqueTwin), super().__reduce_ex__(protocol)[2]


@functools.cache
def twin_of(mixin: type, original: type[nn.Module]) -> type[nn.Module]:
    """The gated subclass of a module class."""
    name = original.__name__ if mixin is ResidualTwin else f"Gated{original.__name__}"
    return type(name, (mixin, original), {"__module__": __name__})


def empty(original: type[nn.Module], mixin: type | None = None) -> nn.Module:
    """A module without attributes, for `pickle` and `copy` to fill."""
    kind = original if mixin is None else twin_of(mixin, original)
    return kind.__new__(kind)
