"""The gated residual section, and the one place where its forward is written."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from layerprune import ops
from layerprune.gates import Gate

GATE_ATTRIBUTE = "_layerprune_gate"
"""Where a module keeps its gate: a plain attribute, so that `state_dict` never sees it."""

Activation = str | nn.Module | None


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Applies a section's activation: ``None``, ``"relu"`` or a module."""
    if activation is None:
        return y
    return F.relu(y) if activation == "relu" else activation(y)


def gated_forward(
    gate: Gate,
    training: bool,
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor] | None,
    activation: Activation,
) -> Tensor:
    """Computes y = act(shortcut(x) + gate * branch(x)), the branch on the running rows only."""
    return gate.run(lambda: _forward(gate, training, x, branch, shortcut, activation))


def _forward(
    gate: Gate,
    training: bool,
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    shortcut: Callable[[Tensor], Tensor] | None,
    activation: Activation,
) -> Tensor:
    draw = gate.current(training, x.shape[0])
    if isinstance(draw, bool):
        straight = x if shortcut is None else shortcut(x)
        return activate(straight + branch(x) if draw else straight, activation)
    if draw.runs_whole():
        rows, rest, slot = x, x, None
    else:
        rows, rest = ops.take_rows(x, draw.rows, exclusive=shortcut is None)
        slot = draw.slot
    straight = rest if shortcut is None else shortcut(rest)
    fused = activation if isinstance(activation, str) else None
    y = ops.gated_residual(
        straight, branch(rows), draw.gate, slot, fused, gate_grad_rows=draw.probes
    )
    return y if fused == activation else activate(y, activation)


class GatedResidual(nn.Module):
    """A residual section: ``act(shortcut(x) + gate * branch(x))``.

    Without a pruner the gate is open and this is a plain residual block.

    Args:
        branch: computes what may turn out not to be needed; ``[B, *S] -> [B, *S']``.
        shortcut: what stays when the branch goes; ``None`` for the identity (then ``S' = S``).
        activation: applied to the sum: ``None``, ``"relu"`` (fused) or a module. A module that
            works in place stops doing so: where the branch is left out, its input is the section's.

    Raises:
        TypeError: if branch, shortcut or activation is none of these.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch must be a module, got {type(branch).__name__}")
        if shortcut is not None and not isinstance(shortcut, nn.Module):
            raise TypeError(f"shortcut must be a module or None, got {type(shortcut).__name__}")
        if not (activation is None or activation == "relu" or isinstance(activation, nn.Module)):
            raise TypeError(f'activation must be None, "relu" or a module, got {activation!r}')
        if isinstance(activation, nn.Module):
            for module in activation.modules():
                if getattr(module, "inplace", False):
                    module.inplace = False
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        setattr(self, GATE_ATTRIBUTE, Gate())

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, *S]`` to ``[B, *S']``."""
        gate = getattr(self, GATE_ATTRIBUTE)
        return gated_forward(gate, self.training, x, self.branch, self.shortcut, self.activation)
