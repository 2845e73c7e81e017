"""Opaque sections: any module whose output has its input's shape.

``y = x + gate * (B(x) - x)``, exactly ``x`` at gate 0 and exactly ``B(x)`` at gate 1, whatever B
is.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from layerprune.gate import Gate
from layerprune.sections.base import BranchCall
from layerprune.sections.placeholders import PassThrough
from layerprune.sections.residual import GATE_ATTRIBUTE


def _first(module: nn.Module, *args: object, **kwargs: object) -> Tensor:
    return module(*args, **kwargs)[0]


class OpaqueAdapter:
    """Gates any module by a twin made for its class.

    Args:
        batched: positions (the first argument is 0) and names of the arguments that carry the batch
            in their first dimension.
        several_arguments: whether the module is called with more than its input.
        shared: those of the tensors among the arguments that do not.
        width: elements of the tuple of which its output is the first; None for a bare tensor.
    """

    kind = "opaque"

    def __init__(
        self,
        batched: frozenset[int | str],
        several_arguments: bool,
        shared: frozenset[int | str] = frozenset(),
        width: int | None = None,
    ) -> None:
        self.batched = batched
        self.several_arguments = several_arguments
        self.shared = shared
        self.width = width

    def attach(self, module: nn.Module, gate: Gate) -> None:
        """See `Adapter`."""
        from layerprune.sections.twins import OpaqueTwin, twin_of

        if not isinstance(module, OpaqueTwin):
            module.__class__ = twin_of(OpaqueTwin, type(module))
        setattr(module, GATE_ATTRIBUTE, (self, gate))

    def detach(self, module: nn.Module) -> None:
        """See `Adapter`."""
        delattr(module, GATE_ATTRIBUTE)
        module.__class__ = type(module).__mro__[2]

    def is_gated(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return hasattr(module, GATE_ATTRIBUTE) and getattr(module, GATE_ATTRIBUTE)[1].owned

    def remainder(self, module: nn.Module, nonnegative_input: bool) -> nn.Module:
        """See `Adapter`."""
        if self.several_arguments or self.width is not None:
            return PassThrough(width=self.width)
        return nn.Identity()

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        return ()

    def branch_call(self, module: nn.Module) -> BranchCall:
        """See `Adapter`."""
        return module, module if self.width is None else functools.partial(_first, module)

    def nonnegative(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return False
