"""Gated twins of torchvision's residual blocks.

A twin is a subclass with the gated forward, put in place by swapping the instance's class: names,
parameters and `state_dict` keys stay as they were.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from layerprune.gate import Gate
from layerprune.sections.arithmetic import residual_forward
from layerprune.sections.base import straight_path
from layerprune.sections.residual import GATE_ATTRIBUTE
from layerprune.sections.twins import outside, run_section


class GatedBasicBlock(BasicBlock):
    """torchvision's ``BasicBlock`` with a gate on its branch."""

    @outside
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C', H', W']``."""
        gate = getattr(self, GATE_ATTRIBUTE)
        parts = (self._branch, self.downsample, "relu")
        return run_section(self, gate, residual_forward, x, *parts)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class GatedBottleneck(Bottleneck):
    """torchvision's ``Bottleneck`` with a gate on its branch."""

    @outside
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to ``[B, C', H', W']``."""
        gate = getattr(self, GATE_ATTRIBUTE)
        parts = (self._branch, self.downsample, "relu")
        return run_section(self, gate, residual_forward, x, *parts)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class BlockAdapter:
    """Gates a torchvision block by its twin."""

    kind = "twin"
    several_arguments = False
    width = None

    def __init__(self, original: type[nn.Module], twin: type[nn.Module]) -> None:
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
        # Not the block's own ReLU: that one works in place, on what is now the previous block's
        # output.
        return straight_path("downsample", module.downsample, "relu", nn.ReLU(), nonnegative_input)

    def kept(self, module: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        return ("downsample",)

    def nonnegative(self, module: nn.Module) -> bool:
        """See `Adapter`."""
        return True


ADAPTERS = (
    BlockAdapter(BasicBlock, GatedBasicBlock),
    BlockAdapter(Bottleneck, GatedBottleneck),
)
"""Known blocks, by their exact class: a subclass may compute something else."""

FORWARD_ORDER = {
    ResNet: (
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "fc"),
    )
}
"""The children of known networks as their forward runs them, each on the output of the last."""
