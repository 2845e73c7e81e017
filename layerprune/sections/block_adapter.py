"""Known blocks, gated by twins that are written for them.

A twin is a subclass with the gated forward, put in place by swapping the instance's class: names,
parameters and `state_dict` keys stay as they were.
"""

from __future__ import annotations

import copy
import functools

from torch import nn

from layerprune.gate import Gate
from layerprune.sections.base import BranchCall, straight_path
from layerprune.sections.residual import GATE_ATTRIBUTE


def elsewhere(activation: nn.Module) -> nn.Module:
    """The same activation, with the same weights, which works in place no more.

    Where the branch is left out, its input is what another module gave.
    """
    found = copy.copy(activation)
    if getattr(found, "inplace", False):
        found.inplace = False
    return found


class BlockAdapter:
    """Gates a block that computes ``act(downsample(x) + branch(x))`` by its twin.

    Args:
        original: the block's class.
        twin: its gated subclass.
        activation: name of the module that the sum goes through.
    """

    kind = "twin"
    several_arguments = False
    width = None

    def __init__(self, original: type[nn.Module], twin: type[nn.Module], activation: str) -> None:
        self.original = original
        self.twin = twin
        self.activation = activation

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
        activation = getattr(module, self.activation)
        parts = ("downsample", module.downsample, self.activation, elsewhere(activation))
        return straight_path(*parts, nonnegative_input)

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        kept = next(getattr(module, self.activation).parameters(), None) is not None
        return ("downsample", self.activation) if kept else ("downsample",)

    def branch_call(self, module: nn.Module) -> BranchCall:
        """See `Adapter`."""
        return module, functools.partial(self.twin._branch, module)

    def nonnegative(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return type(getattr(module, self.activation)) is nn.ReLU
