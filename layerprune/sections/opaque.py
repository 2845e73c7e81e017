"""Opaque sections: any module whose output has its input's shape.

``y = x + gate * (B(x) - x)``, exactly ``x`` at gate 0 and exactly ``B(x)`` at gate 1, whatever B
is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from layerprune import ops
from layerprune.gates import Gate
from layerprune.sections.residual import GATE_ATTRIBUTE


class PassThrough(nn.Module):
    """Returns its first argument: an eliminated section that is called with more than one."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Returns ``x``."""
        return x


class OpaqueTwin:
    """Mixin that puts a gate around the forward of the class it is mixed into."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Runs the module on the running rows and mixes the result with its input."""
        adapter, gate = getattr(self, GATE_ATTRIBUTE)
        run = super().forward
        return gate.run(
            lambda: _forward(gate, self.training, run, adapter.batched, x, args, kwargs)
        )

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The twin's class exists only in memory: name it by its original.
        return _restore, (type(self).__mro__[2],), self.__dict__.copy()


def _forward(
    gate: Gate,
    training: bool,
    run: Callable[..., Tensor],
    batched: frozenset[int | str],
    x: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    draw = gate.current(training, x.shape[0])
    if isinstance(draw, bool):
        return run(x, *args, **kwargs) if draw else x
    if draw.runs_whole():
        y = run(x, *args, **kwargs)
        return ops.gated_residual(x, y, draw.gate, form="lerp", gate_grad_rows=draw.probes)
    args = [a[draw.rows] if i in batched else a for i, a in enumerate(args, start=1)]
    kwargs = {k: v[draw.rows] if k in batched else v for k, v in kwargs.items()}
    rows, rest = ops.take_rows(x, draw.rows, exclusive=True)
    y = run(rows, *args, **kwargs)
    return ops.gated_residual(
        rest, y, draw.gate, draw.slot, form="lerp", gate_grad_rows=draw.probes
    )


@functools.cache
def opaque_twin(original: type[nn.Module]) -> type[nn.Module]:
    """The gated subclass of a module class."""
    return type(f"Gated{original.__name__}", (OpaqueTwin, original), {"__module__": __name__})


def _restore(original: type[nn.Module]) -> nn.Module:
    twin = opaque_twin(original)
    return twin.__new__(twin)


class OpaqueAdapter:
    """Gates any module by a twin made for its class.

    Args:
        batched: positions (the first argument is 0) and names of the arguments that carry the batch
            in their first dimension.
        several_arguments: whether the module is called with more than its input.
    """

    kind = "opaque"

    def __init__(self, batched: frozenset[int | str], several_arguments: bool) -> None:
        self.batched = batched
        self.several_arguments = several_arguments

    def attach(self, module: nn.Module, gate: Gate) -> None:
        """See `Adapter`."""
        if not isinstance(module, OpaqueTwin):
            module.__class__ = opaque_twin(type(module))
        setattr(module, GATE_ATTRIBUTE, (self, gate))

    def detach(self, module: nn.Module) -> None:
        """See `Adapter`."""
        delattr(module, GATE_ATTRIBUTE)
        module.__class__ = type(module).__mro__[2]

    def is_gated(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return isinstance(module, OpaqueTwin) and getattr(module, GATE_ATTRIBUTE)[1].owned

    def remainder(self, module: nn.Module, nonnegative_input: bool) -> nn.Module:
        """See `Adapter`."""
        return PassThrough() if self.several_arguments else nn.Identity()

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        return ()

    def nonnegative(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return False
