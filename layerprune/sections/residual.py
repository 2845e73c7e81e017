"""The gated residual section."""

from __future__ import annotations

from torch import Tensor, nn

from layerprune.gate import Gate
from layerprune.sections.arithmetic import Activation, residual_forward

GATE_ATTRIBUTE = "_layerprune_gate"
"""Where a module keeps its gate: a plain attribute, so that `state_dict` never sees it."""


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
        parts = (self.branch, self.shortcut, self.activation)
        if gate.dispatch is not None:  # a subclass with a forward of its own called this one
            return gate.dispatch(self, gate, residual_forward, x, *parts)
        return residual_forward(gate.current(self.training, x.shape[0]), x, *parts)
