"""What the pruner knows of one section, whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from layerprune.gate import Gate
from layerprune.sections.residual import GATE_ATTRIBUTE, GatedResidual

BranchCall = tuple[nn.Module, Callable[..., Tensor]]
"""A module, and what a call of it adds to the stream, as a function of the call's arguments."""


class Adapter(Protocol):
    """How one kind of section is gated, ungated and removed.

    ``several_arguments``: whether the module is called with more than its input. ``width``: how
    many elements the tuple has whose first one is its output; None for a bare tensor.
    """

    kind: str
    several_arguments: bool
    width: int | None

    def attach(self, module: nn.Module, gate: Gate) -> None:
        """Makes the module draw on ``gate``."""

    def detach(self, module: nn.Module) -> None:
        """Leaves the module as it was before `attach`."""

    def is_gated(self, module: nn.Module) -> bool:
        """Whether a pruner's gate is attached."""

    def remainder(self, module: nn.Module, nonnegative_input: bool) -> nn.Module:
        """What stands in the section's place once its branch is gone."""

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the children that outlive the branch."""

    def branch_call(self, module: nn.Module) -> BranchCall:
        """Whose call runs the branch, and the branch, without a gate."""

    def nonnegative(self, module: nn.Module) -> bool:
        """Whether the section's output can hold no negative value."""


@dataclass(frozen=True)
class Section:
    """A residual section of a model.

    Attributes:
        name: the module's qualified name.
        module: the module; the model's own object.
        adapter: how its kind is gated and removed; None where it has methods of its own for that.
    """

    name: str
    module: nn.Module
    adapter: Adapter | None

    @property
    def kind(self) -> str:
        """``"residual"``, ``"twin"``, ``"opaque"`` or ``"branch"``."""
        return self.adapter.kind

    @property
    def block(self) -> None:
        """The block around it, if that is to go with its last branch."""
        return None

    @property
    def is_gated(self) -> bool:
        """Whether a pruner's gate is attached."""
        return self.adapter.is_gated(self.module)

    def attach(self, gate: Gate) -> None:
        """Makes the section draw on a gate."""
        self.adapter.attach(self.module, gate)

    def detach(self) -> None:
        """Leaves the section's modules as they were before `attach`."""
        self.adapter.detach(self.module)

    def remainders(self, nonnegative_input: bool) -> list[tuple[nn.Module, nn.Module]]:
        """Modules that go with the branch, and what stands in the place of each."""
        return [(self.module, self.adapter.remainder(self.module, nonnegative_input))]

    def emptied(self) -> list[tuple[nn.Module, nn.Module]]:
        """Modules around it that do nothing now that it is removed, and what stands for each."""
        return []

    def in_model(self, model: nn.Module) -> Section:
        """The section of the same name in a model with the same modules, or what is left of it."""
        return replace(self, module=model.get_submodule(self.name))

    def description(self) -> dict[str, object]:
        """What `structure.json` has to say for the section to be found without a forward."""
        width = self.adapter.width
        return {
            "name": self.name,
            "kind": self.kind,
            "several_arguments": self.adapter.several_arguments,
            **({} if width is None else {"width": width}),
        }

    def branch_parameters(self) -> list[nn.Parameter]:
        """The parameters that go when the branch goes."""
        return [p for name, p in self.module.named_parameters() if self._in_branch(name)]

    def branch_tensors(self) -> list[tuple[nn.Module, list[str]]]:
        """Modules, and the keys of each one's `state_dict` that go when the branch goes."""
        return [(self.module, [key for key in self.module.state_dict() if self._in_branch(key)])]

    def branch_calls(self) -> list[BranchCall]:
        """Whose calls run the branch, and what runs it alone, while it has no gate."""
        return [self.adapter.branch_call(self.module)]

    def _in_branch(self, name: str) -> bool:
        return name.partition(".")[0] not in self.adapter.kept(self.module)

    def branch_flops(self, flops: dict[str, float]) -> float:
        """Operations of one row's branch, from `cost.forward_flops` of the whole model."""
        kept = sum(flops.get(f"{self.name}.{name}", 0.0) for name in self.adapter.kept(self.module))
        return flops.get(self.name, 0.0) - kept


class ResidualAdapter:
    """`GatedResidual`: the module gates itself, by a twin once it has a pruner."""

    kind = "residual"
    several_arguments = False
    width = None

    def attach(self, module: GatedResidual, gate: Gate) -> None:
        """See `Adapter`."""
        from layerprune.sections.twins import ResidualTwin, run_section, twin_of

        gate.dispatch = run_section
        if type(module).forward is GatedResidual.forward:
            module.__class__ = twin_of(ResidualTwin, type(module))
        setattr(module, GATE_ATTRIBUTE, gate)

    def detach(self, module: GatedResidual) -> None:
        """See `Adapter`."""
        from layerprune.sections.twins import ResidualTwin

        if isinstance(module, ResidualTwin):
            module.__class__ = type(module).__mro__[2]
        setattr(module, GATE_ATTRIBUTE, Gate())

    def is_gated(self, module: GatedResidual) -> bool:
        """See `Adapter`."""
        return getattr(module, GATE_ATTRIBUTE).owned

    def remainder(self, module: GatedResidual, nonnegative_input: bool) -> nn.Module:
        """See `Adapter`."""
        activation = nn.ReLU() if module.activation == "relu" else module.activation
        return straight_path(
            "shortcut", module.shortcut, "activation", activation, nonnegative_input
        )

    def kept(self, module: GatedResidual) -> tuple[str, ...]:
        """See `Adapter`."""
        return ("shortcut", "activation")

    def branch_call(self, module: GatedResidual) -> BranchCall:
        """See `Adapter`."""
        return module.branch, module.branch

    def nonnegative(self, module: GatedResidual) -> bool:
        """See `Adapter`."""
        return module.activation == "relu" or isinstance(module.activation, nn.ReLU)


def straight_path(
    shortcut_name: str,
    shortcut: nn.Module | None,
    activation_name: str,
    activation: nn.Module | None,
    nonnegative_input: bool,
) -> nn.Module:
    """The shortcut and the activation that must stay, under the names they had.

    A ReLU behind an identity shortcut goes when its input holds no negative value anyway.
    """
    if shortcut is None and isinstance(activation, nn.ReLU) and nonnegative_input:
        activation = None
    parts = {shortcut_name: shortcut, activation_name: activation}
    present = {name: module for name, module in parts.items() if module is not None}
    if not present:
        return nn.Identity()
    path = nn.Sequential()
    for name, module in present.items():
        path.add_module(name, module)
    return path
