"""Known blocks, gated by twins that are written for them.

A twin is a subclass with the gated forward, put in place by swapping the instance's class: names,
parameters and `state_dict` keys stay as they were.
"""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn

from layerprune.gate import Gate
from layerprune.sections.arithmetic import residual_forward
from layerprune.sections.base import BranchCall, straight_path
from layerprune.sections.residual import GATE_ATTRIBUTE
from layerprune.sections.twins import outside, run_section


def _elsewhere(activation: nn.Module) -> nn.Module:
    """The same activation, with the same weights, which works in place no more.

    Where the branch is left out, its input is what another module gave.
    """
    found = copy.copy(activation)
    if getattr(found, "inplace", False):
        found.inplace = False
    return found


class GatedBlock:
    """Mixin with the gated forward of a block ``act(downsample(x) + branch(x))``.

    The twin says what ``_branch`` computes, and which module the sum goes through.
    """

    last: str

    @outside
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C', H', W']``."""
        gate, activation = getattr(self, GATE_ATTRIBUTE), getattr(self, self.last)
        fused = "relu" if type(activation) is nn.ReLU else _elsewhere(activation)
        parts = (self._branch, self.downsample, fused)
        return run_section(self, gate, residual_forward, x, *parts)


class BlockAdapter:
    """Gates a block by its twin.

    Args:
        original: the block's class.
        twin: its subclass with `GatedBlock`.
    """

    kind = "twin"
    several_arguments = False
    width = None

    def __init__(self, original: type[nn.Module], twin: type[GatedBlock]) -> None:
        self.original = original
        self.twin = twin

    def attach(self, module: nn.Module, gate: Gate) -> None:
        """See `Adapter`."""
        module.__class__ = self.twin
        setattr(module, GATE_ATTRIBUTE, gate)

    def detach(self, module: nn.Module) -> None:
        """See `Adapter`."""
        delattr(module, GATE_ATTRIBUTE)
        module.__class__ = self.original

    def is_gated(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return type(module) is self.twin and getattr(module, GATE_ATTRIBUTE).owned

    def remainder(self, module: nn.Module, nonnegative_input: bool) -> nn.Module:
        """See `Adapter`."""
        activation = getattr(module, self.twin.last)
        parts = ("downsample", module.downsample, self.twin.last, _elsewhere(activation))
        return straight_path(*parts, nonnegative_input)

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        kept = next(getattr(module, self.twin.last).parameters(), None) is not None
        return ("downsample", self.twin.last) if kept else ("downsample",)

    def branch_call(self, module: nn.Module) -> BranchCall:
        """See `Adapter`."""
        return module, functools.partial(self.twin._branch, module)

    def nonnegative(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return type(getattr(module, self.twin.last)) is nn.ReLU
